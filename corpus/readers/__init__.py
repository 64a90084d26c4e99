"""Readers of the twenty-four domains: unpacked packages to raw documents, by kind of text.

Unlike `sources.py`, which makes what is shipped, they read whole packages without looking at the
licence of each file: what they make is for experiments where it was made, not for publishing.
"""
