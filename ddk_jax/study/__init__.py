"""Studies: a grid of runs, method by seed, and what statistics say of it. See `docs/study.md`."""
