"""Freed memory goes back to the system."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from ddk_jax.training.memory import give_back

MIB = 2**20


def resident_bytes() -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is of glibc")
def test_what_malloc_kept_for_later_is_given_back() -> None:
    pieces = [bytes([number % 256]) * (MIB // 16) for number in range(2048)]  # below mmap's limit
    last = pieces.pop()
    del pieces
    kept = resident_bytes()
    give_back()
    assert kept - resident_bytes() > 64 * MIB
    assert len(last) == MIB // 16


def test_without_that_function_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    give_back()
