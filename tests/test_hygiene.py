"""Rules that hold for every file: nothing that runs what it reads, no setting without its words."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddk_jax.config import load_config

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "configs" / "study").glob("*.yaml"))
"""No configs of runs; tests/test_study.py reads them."""
CONFIGS = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*STUDIES})
FOLDERS = ("ddk_jax", "tests", "corpus", "benchmarks", "notebooks", "tpu_setup")

# Formats that run code when they are read.
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "os.popen",
    "os.system",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "torch.load",
    "yaml.full_load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
}
UNSAFE_ARGUMENTS = {"allow_pickle", "shell", "trust_remote_code"}


def python_sources() -> Iterator[tuple[str, str]]:
    """Name and text of every module, and of every code cell of the notebooks."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        for path in sorted((ROOT / folder).rglob("*.ipynb")):
            for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
                lines = "".join(cell["source"]).splitlines()
                # Magics and shell lines are IPython's, and keep their place in a block.
                code = ["pass" if line.startswith(("%", "!")) else line for line in lines]
                if cell["cell_type"] == "code":
                    yield f"{path.relative_to(ROOT)} cell {number}", "\n".join(code)


def unsafe(source: str) -> list[str]:
    """What a module does that runs, or could run, what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
            found += [name for name in names if name in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in full if name in UNSAFE_CALLS]
            found += [m for m in [(node.module or "").split(".")[0]] if m in UNSAFE_MODULES]
        elif isinstance(node, ast.Call):
            if (name := ast.unparse(node.func)) in UNSAFE_CALLS:
                found.append(name)
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in UNSAFE_ARGUMENTS and not off:
                    found.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
    return found


def undocumented_fields(source: str) -> list[str]:
    """Fields of dataclasses without a docstring; a nested dataclass has its own."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    dataclasses = [
        c for c in classes if any("dataclass" in ast.unparse(d) for d in c.decorator_list)
    ]
    names = {node.name for node in dataclasses}
    found = []
    for owner in dataclasses:
        if ast.get_docstring(owner) is None:
            found.append(owner.name)
        for field, after in zip(owner.body, [*owner.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or ast.unparse(field.annotation) in names:
                continue
            value = after.value if isinstance(after, ast.Expr) else None
            if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
                found.append(f"{owner.name}.{ast.unparse(field.target)}")
    return found


def test_nothing_runs_what_it_reads():
    found = {name: hits for name, source in python_sources() if (hits := unsafe(source))}
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as safe",
        "eval(text)",
        "exec(compile(text, 'f', 'exec'))",
        "yaml.load(text, Loader=Loader)",
        "from yaml import unsafe_load",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=trusted)",
        "subprocess.run(command, shell=True)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "os.system(command)",
    ],
)
def test_what_runs_what_it_reads_is_found(source):
    assert unsafe(source) != []


def test_safe_relatives_are_not_reported():
    assert unsafe("np.load(p, allow_pickle=False); yaml.safe_load(t); model.eval()") == []


@pytest.mark.parametrize("module", ["config.py", "models/spec.py"])
def test_every_setting_says_what_it_is(module):
    source = (ROOT / "ddk_jax" / module).read_text(encoding="utf-8")
    assert undocumented_fields(source) == []


def test_a_setting_without_words_is_found():
    source = (
        '@dataclass(frozen=True)\nclass A:\n    """A."""\n    x: int\n    """X."""\n    y: int\n'
        '@dataclass\nclass B:\n    a: A\n    z: float\n    """Z."""\n'
    )
    assert undocumented_fields(source) == ["A.y", "B"]


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_short_and_loads(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    load_config(path)
