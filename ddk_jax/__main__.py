"""`python -m ddk_jax` is the same as the command `ddk`."""

import sys

from ddk_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
