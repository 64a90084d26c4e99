"""Mathematics: formal statements, proof scripts, and questions made by a program."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cleaning import Document
from reading import gathered, in_groups, name_of, names, read

QUESTIONS = 30_000
_NEEDED = {"numpy": "numpy", "sympy": "sympy", "six": "six", "absl": "absl-py"}
"""What the questions' package imports, by module."""


def math_formal(work: Path) -> Iterator[Document]:
    """Metamath's set.mm with its proofs."""
    text = read(work / name_of(work, "x/metamath-databases/**/set.mm"))
    text = re.sub(r"\n\s*\$\{\s*\n", "\n\n${\n", text)
    for group in gathered(re.split(r"\n\s*\n", text), 3_000, "\n\n"):
        yield Document("set.mm", group)


def math_proofs(work: Path) -> Iterator[Document]:
    """HOL Light's proof scripts and PARI's manuals in TeX."""
    patterns = ("x/hol-light/usr/share/hol-light/**/*.ml", "x/pari-doc/**/*.tex*")
    for name in names(work, *patterns):
        yield Document(name, read(work / name))


def missing_packages() -> list[str]:
    """Return the names of the packages that `math_qa` needs and that are not installed."""
    return [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]


def math_qa(work: Path) -> Iterator[Document]:
    """School questions with answers, made by `mathematics_dataset`; some minutes of work.

    The questions depend on the versions of numpy and sympy, since where a kind of question fails
    with them another is asked instead, and on PYTHONHASHSEED, by which sets of names are ordered.

    Raises:
        ModuleNotFoundError: A package that the questions need is not installed.
        RuntimeError: As many questions failed as were to be made.
    """
    if missing := missing_packages():
        raise ModuleNotFoundError(f"math_qa needs packages: pip install {' '.join(missing)}")
    return in_groups(_questions(_kinds_of_questions(work)), 8, "\n\n")


def _questions(kinds: list[tuple[str, Callable[[], Any]]]) -> Iterator[Document]:
    chosen = random.Random(0)  # noqa: S311 (not for security)
    made = failed = 0
    while made < QUESTIONS:
        kind, make = kinds[chosen.randrange(len(kinds))]
        try:
            problem = make()
        except Exception as error:  # any: the package is older than the libraries that it calls
            failed += 1
            if failed == QUESTIONS:
                raise RuntimeError(f"{failed} questions failed, the last with {error!r}") from error
            continue
        made += 1
        yield Document(kind, f"Question: {problem.question}\nAnswer: {problem.answer}")


def _kinds_of_questions(work: Path) -> list[tuple[str, Callable[[], Any]]]:
    """Import the package out of the working folder and seed its random numbers."""
    root = work / name_of(work, "xw/mathematics_dataset/mathematics_dataset/__init__.py")
    sys.path.insert(0, str(root.parents[1].resolve()))
    warnings.filterwarnings("ignore", "In the future `np.object`", FutureWarning)
    numpy = importlib.import_module("numpy")
    # A name that sympy has moved since the package was written.
    solvers = importlib.import_module("sympy.solvers.diophantine")
    moved = importlib.import_module("sympy.solvers.diophantine.diophantine")
    if not hasattr(solvers, "base_solution_linear"):
        vars(solvers)["base_solution_linear"] = moved.base_solution_linear
    for module in (random, numpy.random, importlib.import_module("sympy.core.random")):
        module.seed(0)
    # Entities are gone through in sets, which order them by where they lie in memory.
    composition = importlib.import_module("mathematics_dataset.util.composition")
    number = itertools.count()
    composition.Entity.__hash__ = lambda entity: vars(entity).setdefault("number", next(number))
    modules = importlib.import_module("mathematics_dataset.modules.modules")
    return list(_leaves(modules.train(lambda entropy: entropy), ""))


def _leaves(tree: dict[str, Any], path: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}__{name}")
        else:
            yield f"{path}__{name}", value
