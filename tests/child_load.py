"""A program of its own: load the model in a directory and print what that took, as JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import jax

from ddk_jax.models import hf


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(directory: Path, dtype: str) -> None:
    spec = hf.read_spec(directory)
    jax.block_until_ready(jax.numpy.zeros(8) + 1)  # start the backend
    before, start = peak_bytes(), time.monotonic()
    params = jax.block_until_ready(hf.load(directory, spec=spec, dtype=dtype))
    seconds = time.monotonic() - start
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    print(json.dumps({"peak": peak_bytes() - before, "params": sum(sizes), "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
