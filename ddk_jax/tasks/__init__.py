"""Benchmarks: examples from files, what a model makes of them, and the scores that follow."""
