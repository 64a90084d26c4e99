"""Distil a large language model into a small one, on the domains where it is furthest behind.

The package is imported room by room (`ddk_jax.config`, `ddk_jax.training.loop`, ...). Importing it
starts no accelerator and loads no framework, so that data workers and `ddk --help` stay light.
"""

__version__ = "0.1.0"
