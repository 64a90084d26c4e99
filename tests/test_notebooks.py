"""The notebooks run from top to bottom."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import numpy as np
import pytest

from ddk_jax.models import hf
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.spec import ModelSpec
from ddk_jax.places import resolve_path

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


# Of two families: what the second notebook distils into what.
MODELS = {
    "DDK_TEACHER": ModelSpec(
        family="qwen2",
        qkv_bias=True,
        vocab_size=4096,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        ffn_size=64,
    ),
    "DDK_STUDENT": ModelSpec(
        vocab_size=4096, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=32
    ),
}


def write_model(directory: Path, spec: ModelSpec) -> None:
    """Random weights, and the tokenizer of the package."""
    rng = np.random.default_rng(0)

    def leaf(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal(0, 0.05, shape.shape), jnp.float32)

    params = jax.tree.map(leaf, Decoder(spec=spec).abstract())
    tokenizer = resolve_path("assets:tokenizer")
    hf.export(params, spec, directory, tokenizer_dir=tokenizer, card="A random model.\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
# The kernel's sockets are closed by the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("DDK_STEPS", "4")
    monkeypatch.setenv("DDK_DIRECTORY", str(tmp_path / "made"))
    for name, spec in MODELS.items():
        write_model(tmp_path / name, spec)
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert pictures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)
