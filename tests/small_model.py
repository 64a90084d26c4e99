"""A decoder of three layers with random values, and its model directory.

`conftest` has fixtures for it: `tokenizer_dir`, `exported` (in shards, not to be changed), and, to
be changed, `copied` and `single`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file

from ddk_jax.models import hf
from ddk_jax.models.decoder import Decoder, Params
from ddk_jax.models.spec import ModelSpec

SPEC = ModelSpec(
    vocab_size=64,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=48,
    rope_theta=300.0,
    norm_eps=1e-6,
    tied_head=False,
    max_positions=96,
)
TIED = dataclasses.replace(SPEC, tied_head=True)
TEXT = "the small model reads what the large model wrote"


def randomised(spec: ModelSpec = SPEC, dtype: Any = jnp.float32) -> Params:
    """The same values every time."""
    rng = np.random.default_rng(0)

    def leaf(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal(0, 0.25, shape.shape), dtype)

    return jax.tree.map(leaf, Decoder(spec=spec).abstract())


def assert_equal_trees(ours: Params, theirs: Params) -> None:
    """Bitwise, types included."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def write_tokenizer(directory: Path) -> Path:
    """A byte-level tokenizer of less than 64 tokens, and nothing beside it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=50, special_tokens=["<|start|>", "<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def export(directory: Path, tokenizer: Path, spec: ModelSpec, **settings: Any) -> Path:
    """Write the model of `randomised(spec)`."""
    settings = {"card": "# A card\n", **settings}
    hf.export(randomised(spec), spec, directory, tokenizer_dir=tokenizer, **settings)
    return directory


def without_checksums(source: Path, directory: Path) -> Path:
    """A copy without checksums, which would notice every change first."""
    shutil.copytree(source, directory)
    (directory / "SHA256SUMS").unlink()
    return directory


def edit_json(file: Path, **changes: Any) -> None:
    """Change some keys of an object."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Let a function change the tensors of a file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
