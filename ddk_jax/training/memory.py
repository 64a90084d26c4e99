"""Memory of the host that nobody uses."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Hand the freed memory of this process back to the system, where the C library can (glibc).

    A compilation leaves hundreds of MiB behind, in pieces that malloc keeps for later; nothing as
    large comes after it.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, Windows
        return
    trim(ctypes.c_size_t(0))
