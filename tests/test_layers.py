"""The map of the package: who may import whom.

Imports point down, or stay inside one group. A module that is not on the map fails, and so does an
entry of the map that has no module.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ddk_jax

ROOT = Path(ddk_jax.__file__).parent

# From the bottom up. Every entry is a module, or a package whose modules are on one level; the
# entries of an inner list may import each other (without a cycle), all others of a level may not.
LAYERS: list[list[list[str]]] = [
    [["errors"]],
    [["models.spec"], ["plain"], ["places"]],
    [
        ["config"],
        ["losses"],
        ["mixture"],
        [
            "parallel.mesh",
            "parallel.processes",
            "parallel.compiled",
            "parallel.hlo",
            "parallel.work",
            "parallel.traffic",
            "parallel.buffers",
            "parallel.chips",
        ],
    ],
    [
        [
            "training.state",
            "training.optimizer",
            "training.memory",
            "training.metrics",
            "training.transfer",
            "training.lease",
            "training.preemption",
            "training.rundir",
            "training.checksums",
            "training.bucket",
            "training.checkpoint_files",
        ],
        [
            "data.sources",
            "data.chat",
            "data.tokenize",
            "data.shards",
            "data.stream",
            "data.packing",
            "data.rows",
            "data.retokenise",
        ],
        [
            "models.decoder",
            "models.layers",
            "models.attention",
            "models.kernels",
            "models.lookup",
            "models.quantise",
            "models.cache",
            "models.sampling",
            "models.rope",
            "models.tree",
            "models.collect",
            "models.initial",
            "models.lora",
            "models.families",
            "models.prune",
            "models.tensors",
            "models.layout",
            "models.directory",
        ],
    ],
    [
        [
            "training.micro",
            "training.step",
            "training.evaluate",
            "training.checkpoint",
            "training.terms",
            "training.steering",
            "training.importance",
        ],
        [
            "data.pipeline",
            "data.epochs",
            "data.workers",
            "data.convert",
            "data.merge",
            "data.leaks",
            "data.assemble",
            "data.prepare",
        ],
        ["models.hf", "models.hub", "models.load", "models.save", "models.gguf", "models.generate"],
        ["tasks"],
    ],
    [["training.loaded", "training.student", "training.build"], ["training.corpus"]],
    [["training.loop"], ["training.trained"], ["analysis"], ["samples"], ["planning"]],
    [["training.export", "training.pruning", "card"]],
    [["doctor", "inspection", "prepared"], ["quickstart"], ["advice"], ["study"]],
    [["arguments"], ["console"]],
    [["cli"]],
    [["__main__"]],
]

# Packages that span levels. Importing one of their modules runs their __init__, which therefore
# imports nothing of ours; the root has the version.
FRONTS = {"ddk_jax", "ddk_jax.data", "ddk_jax.models", "ddk_jax.parallel", "ddk_jax.training"}

# What rooms may import from outside: the standard library and these.
OUTSIDE_OF = {
    "ddk_jax.mixture": {"numpy", "jaxtyping"},  # which does not import jax
    "ddk_jax.losses": {"jax", "jaxtyping"},
}
# What rooms must not import.
FORBIDDEN_IN = {
    # Data workers must never start an accelerator.
    "ddk_jax.data": {"jax", "flax", "optax", "orbax", "ddk_jax.models", "ddk_jax.parallel"},
    "ddk_jax": {"torch", "tensorflow"},
}
# Heavy packages: imported where they are used, never by importing one of our modules.
LAZY = {
    "transformers",
    "tensorflow_datasets",
    "huggingface_hub",
    "gguf",
    "datasets",
    "pyarrow",
    "array_record",
}


class Arrow(NamedTuple):
    """One import: `source` is a module of ours; `at_top` if importing the module performs it."""

    source: str
    target: str
    at_top: bool


class Place(NamedTuple):
    """Where a module is on the map."""

    layer: int
    group: str


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_package(root: Path) -> dict[str, str]:
    """Source text of every module by its full name."""
    paths = sorted(root.rglob("*.py"))
    return {module_name(path, root): path.read_text(encoding="utf-8") for path in paths}


def imports(name: str, source: str, modules: dict[str, str]) -> Iterator[Arrow]:
    """Every import statement of a module, also those inside functions and type-checking blocks."""
    tree = ast.parse(source)
    within = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        at_top = id(node) not in within
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Arrow(name, alias.name, at_top)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports of ours are written in full, not relative"
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Arrow(name, inner if inner in modules else base, at_top)


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def place(name: str) -> Place | None:
    """Finds a module of ours on the map."""
    if name in FRONTS:
        return Place(-1, name)
    for layer, groups in enumerate(LAYERS):
        for group in groups:
            if any(is_in(name, f"ddk_jax.{entry}") for entry in group):
                return Place(layer, " ".join(group))
    return None


def complaints(modules: dict[str, str]) -> list[str]:
    """Everything that contradicts the map, one line each."""
    found = [f"{name} is not on the map" for name in modules if place(name) is None]
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, source in modules.items():
        for arrow in imports(name, source, modules):
            found += outside_complaints(arrow)
            here, there = place(name), place(arrow.target)
            if not is_in(arrow.target, "ddk_jax") or here is None:
                continue
            graph[name].add(arrow.target)
            if there is None:
                found.append(f"{name} imports {arrow.target}, which is not on the map")
            elif there.layer > here.layer:
                found.append(f"{name} imports {arrow.target}: upward")
            elif there.layer == here.layer and there.group != here.group:
                found.append(f"{name} imports {arrow.target}: sideways")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"imports in a circle: {' -> '.join(reversed(error.args[1]))}")
    return found


def outside_complaints(arrow: Arrow) -> Iterator[str]:
    """What an import says against the rules on packages that are not ours."""
    top = arrow.target.split(".")[0]
    for room, allowed in OUTSIDE_OF.items():
        known = top in allowed or top in sys.stdlib_module_names or is_in(arrow.target, room)
        if is_in(arrow.source, room) and not known:
            yield f"{arrow.source} imports {arrow.target}: {room} has {sorted(allowed)} only"
    for room, forbidden in FORBIDDEN_IN.items():
        if is_in(arrow.source, room) and any(is_in(arrow.target, name) for name in forbidden):
            yield f"{arrow.source} imports {arrow.target}: not in {room}"
    if top in LAZY and arrow.at_top:
        yield f"{arrow.source} imports {arrow.target} at its top: import it where it is used"


def test_imports_follow_the_map():
    assert complaints(read_package(ROOT)) == []


def test_the_map_has_no_ghosts():
    modules = read_package(ROOT)
    entries = [entry for groups in LAYERS for group in groups for entry in group]
    assert [entry for entry in entries if f"ddk_jax.{entry}" not in modules] == []


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("ddk_jax.utils", "", "not on the map"),
        ("ddk_jax.config", "import ddk_jax.training.loop", "upward"),
        ("ddk_jax.config", "def f():\n    from ddk_jax.training import loop", "upward"),
        ("ddk_jax.config", "from ddk_jax import losses", "sideways"),
        ("ddk_jax.training.step", "from ddk_jax.models.hf import load", "sideways"),
        ("ddk_jax.models", "from ddk_jax.models.spec import ModelSpec", "upward"),
        ("ddk_jax.models.decoder", "from ddk_jax.models import families", "circle"),
        ("ddk_jax.data.rows", "import jax.numpy as jnp", "not in ddk_jax.data"),
        ("ddk_jax.data.rows", "from ddk_jax.models.spec import ModelSpec", "not in ddk_jax.data"),
        ("ddk_jax.mixture", "import jax", "['jaxtyping', 'numpy'] only"),
        ("ddk_jax.mixture", "from ddk_jax.errors import UserError", "['jaxtyping', 'numpy'] only"),
        ("ddk_jax.losses", "import numpy as np", "['jax', 'jaxtyping'] only"),
        ("ddk_jax.models.hf", "def f():\n    import torch", "not in ddk_jax"),
        ("ddk_jax.models.hf", "from transformers import AutoTokenizer", "where it is used"),
    ],
)
def test_a_contradiction_is_found(name, source, complaint):
    legal = {
        "ddk_jax": "",
        "ddk_jax.models": "",
        "ddk_jax.training": "",
        "ddk_jax.models.spec": "",
        "ddk_jax.models.families": "from ddk_jax.models.decoder import Decoder",
        "ddk_jax.models.decoder": "from ddk_jax.models.spec import ModelSpec",
        "ddk_jax.models.hf": "def f():\n    import transformers",
        "ddk_jax.losses": "import jax",
        "ddk_jax.mixture": "import math\nimport numpy as np",
        "ddk_jax.training.loop": "from ddk_jax import config",
        "ddk_jax.config": "",
    }
    assert complaints(legal) == []
    found = complaints(legal | {name: source})
    assert len(found) >= 1 and any(complaint in line for line in found), found
