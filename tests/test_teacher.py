"""The shipped teacher is the model that transformers reads from the same files."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ddk_jax.config import load_config
from ddk_jax.data.tokenize import Tokenizer, same_tokens
from ddk_jax.models import hf
from ddk_jax.models.decoder import Decoder, num_parameters
from ddk_jax.places import resolve_path

TEACHER = resolve_path("assets:teacher")
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune"


def test_it_has_the_tokenizer_of_the_corpus():
    assert same_tokens(Tokenizer(TEACHER), Tokenizer(resolve_path("assets:tokenizer"))) == []


def test_it_is_bfloat16_and_of_the_documented_size():
    spec = hf.read_spec(TEACHER)
    assert num_parameters(spec) == 4_000_000
    weights = (TEACHER / "model.safetensors").stat().st_size
    assert 2 * num_parameters(spec) < weights < 2 * num_parameters(spec) + 10_000


def test_its_config_is_the_one_that_reproduces_it():
    config = load_config(Path(__file__).parents[1] / "configs" / "teacher.yaml")
    spec = hf.read_spec(TEACHER)
    for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size"):
        assert getattr(config.student.spec, name) == getattr(spec, name)


@pytest.mark.torch
@pytest.mark.slow
def test_logits_equal_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    spec = hf.read_spec(TEACHER)
    ids = Tokenizer(TEACHER).encode([TEXT])[0][None, :].astype(np.int32)
    reference = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = reference(torch.from_numpy(ids.astype(np.int64))).logits.numpy()

    decoder, params = Decoder(spec=spec), hf.load(TEACHER, spec=spec)
    segments = jnp.ones(ids.shape, jnp.int32)
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    hidden, _ = decoder.apply(params, jnp.asarray(ids), segments, positions)
    logits = np.asarray(hidden @ decoder.head(params).kernel)
    assert np.abs(logits - wanted).max() <= 1e-4 * np.abs(wanted).max()
