"""Options of the compiler for programs that take longer to compile than to run."""

from __future__ import annotations

from typing import Any

QUICK: Any = {"xla_backend_optimization_level": 0}
EXACT: Any = {**QUICK, "xla_allow_excess_precision": False}
"""Likewise, with every rounding to bfloat16 that a program asks for; without it XLA leaves
some out."""
