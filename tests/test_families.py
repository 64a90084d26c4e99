from __future__ import annotations

import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from decoder_reference import documents, numpy_states, run
from hub_configs import HUB
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ddk_jax.errors import UserError
from ddk_jax.models import families, hf
from ddk_jax.models.decoder import Decoder, Params, num_parameters
from ddk_jax.models.spec import ModelSpec, RopeScaling

try:
    import torch_models
    from torch_models import VARIANTS
except pytest.skip.Exception:  # without torch, what needs it is left out
    VARIANTS = {}

LENGTH = 40
"""Tokens of a row: more than all windows, and than the original length of stretched positions."""


def by_cost(names: Any) -> list[Any]:
    """Variants as parameters, the slow ones marked."""
    return [
        pytest.param(name, marks=pytest.mark.slow if VARIANTS[name].is_slow else ())
        for name in names
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From a variant to its directory and transformers' model. Not to be changed."""
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("saved")
    return cache(lambda name: (root / name, torch_models.random_model(root / name, VARIANTS[name])))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer tokens than the models have embeddings: their vocabulary is padded."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def relative(ours: Any, theirs: Any) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def first_difference(ours: Any, theirs: Any) -> str:
    """At which layer two runs part, by the inputs of all layers and the final states."""
    assert len(ours) == len(theirs)
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if not relative(one, other) < 1e-4:
            where = f"the input of layer {i}" if i < len(ours) - 1 else "the final norm"
            return f"{where} differs by {relative(one, other):.1e}"
    return ""


# --- parity with transformers -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("name", VARIANTS)
def test_imported_models_equal_transformers_layer_by_layer(saved: Any, name: str) -> None:
    directory, model = saved(name)
    spec = hf.read_spec(directory)
    tokens = documents(LENGTH)[0]
    theirs, layers = torch_models.forward(model, tokens[None])
    ours = numpy_states(hf.load(directory, spec=spec), spec, tokens)
    assert first_difference(ours.hidden, layers[:, 0]) == ""
    assert relative(ours.logits, theirs[0]) < 1e-5


@pytest.mark.torch
@pytest.mark.parametrize("name", by_cost(VARIANTS))
def test_the_decoder_equals_transformers_for_documents_alone_and_packed(
    saved: Any, name: str
) -> None:
    directory, model = saved(name)
    spec = hf.read_spec(directory)
    decoder, params = Decoder(spec=spec), hf.load(directory, spec=spec)
    tokens = jnp.asarray(np.stack(documents(LENGTH, LENGTH)))
    theirs, layers = torch_models.forward(model, np.asarray(tokens))
    ours, found = run(decoder, params, tokens, jnp.ones_like(tokens))
    assert first_difference(found.hidden, layers) == ""
    assert relative(ours, theirs) < 1e-4
    print(f"parity {VARIANTS[name].model_type} {name} {relative(ours, theirs):.1e}")

    # Two documents and padding in the second row; each of the two alone in a row of its own.
    first, second = documents(17, 19, seed=3)
    row = np.concatenate([first, second, np.full(LENGTH - 36, 5, np.int32)])
    ids = np.repeat(np.int32([1, 2, 0]), [17, 19, LENGTH - 36])
    packed = run(
        decoder, params, jnp.asarray(np.stack([row[::-1], row])), jnp.asarray(np.stack([ids, ids]))
    )[0][1]
    rows, ids = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), np.int32)
    for i, document in enumerate((first, second)):
        rows[i, : len(document)], ids[i, : len(document)] = document, 1
    alone = run(decoder, params, jnp.asarray(rows), jnp.asarray(ids))[0]
    assert relative(packed[:17], alone[0, :17]) < 1e-5
    assert relative(packed[17:36], alone[1, :19]) < 1e-5


@pytest.mark.torch
@pytest.mark.parametrize("name", by_cost(VARIANTS))
def test_transformers_loads_an_export_and_computes_the_same(
    saved: Any, name: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    directory, model = saved(name)
    spec = hf.read_spec(directory)
    hf.export(
        hf.load(directory, spec=spec), spec, tmp_path / "out", tokenizer_dir=tokenizer_dir, card=""
    )
    loaded, info = torch_models.transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    tokens = np.stack(documents(LENGTH, LENGTH))
    theirs, again = (torch_models.forward(one, tokens)[0] for one in (model, loaded))
    # Not bit by bit: one function may have several names, each with its own way of rounding.
    assert relative(again, theirs) < 1e-6


@pytest.mark.torch
@pytest.mark.parametrize("name", VARIANTS)
def test_import_and_export_are_inverse_bit_by_bit(
    saved: Any, name: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    assert_inverse(saved(name)[0], tmp_path / "out", tokenizer_dir, "float32")


@pytest.mark.torch
@pytest.mark.parametrize("name", by_cost(VARIANTS))
def test_import_and_export_of_bfloat16_are_inverse_bit_by_bit(
    name: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    torch_models.random_model(tmp_path / "in", VARIANTS[name], dtype=torch_models.torch.bfloat16)
    assert_inverse(tmp_path / "in", tmp_path / "out", tokenizer_dir, "bfloat16")


def assert_inverse(directory: Path, out: Path, tokenizer_dir: Path, dtype: str) -> None:
    """The files that an imported model is exported to hold the same bits.

    So what is imported from them again is the same too.
    """
    params, spec = hf.load(directory, dtype=np.dtype(dtype)), hf.read_spec(directory)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    hf.export(params, spec, out, tokenizer_dir=tokenizer_dir, dtype=np.dtype(dtype), card="")
    assert hf.read_spec(out) == spec
    one, other = (load_file(place / "model.safetensors") for place in (directory, out))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype.name == other[key].dtype.name == dtype
        np.testing.assert_array_equal(tensor.view(np.uint8), other[key].view(np.uint8))


# --- every key counts -----------------------------------------------------------------------------

# A variant of each family in which all its keys have an effect, and another value of each key.
TELLING = {
    "llama": "llama",
    "qwen2": "qwen2_upper_windows",
    "qwen3": "qwen3",
    "mistral": "mistral",
    "phi3": "phi3_long",
    "olmo2": "olmo2",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_bigcode": "gpt_bigcode",
    "starcoder2": "starcoder2",
    "gpt_neox": "gpt_neox",
}
OTHER_VALUES: dict[str, Any] = {
    "vocab_size": 80, "hidden_size": 64, "n_embd": 64, "intermediate_size": 56, "n_inner": 56,
    "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 2, "n_head": 2,
    "num_key_value_heads": 4, "head_dim": 20, "max_position_embeddings": 128, "n_positions": 128,
    "hidden_act": "relu", "hidden_activation": "relu", "activation_function": "relu",
    "rms_norm_eps": 0.5, "layer_norm_eps": 0.5, "layer_norm_epsilon": 0.5, "norm_epsilon": 0.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
    "sliding_window": 3, "use_sliding_window": False, "max_window_layers": 2,
    "layer_types": ["sliding_attention"] * 3, "original_max_position_embeddings": 20,
    "query_pre_attn_scalar": 3, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0,
    "is_encoder_decoder": True,
}  # fmt: skip
SWITCHES = {
    "tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "use_parallel_residual",
    "multi_query", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention",
    "use_bidirectional_attention",
}  # fmt: skip
# Of no effect on what a causal language model computes, or on training with dropout only; or how
# precisely something is computed that we compute in float32.
WITHOUT_EFFECT = {
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "initializer_range",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp", "is_decoder",
    "attention_dropout", "hidden_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "residual_dropout", "embedding_dropout", "summary_type", "summary_use_proj",
    "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "reorder_and_upcast_attn", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32",
}  # fmt: skip


def written_by_transformers(config: Any) -> dict[str, Any]:
    """All keys, as in a file."""
    return json.loads(config.to_json_string(use_diff=False))


def logits_with(params: Params, spec: ModelSpec) -> np.ndarray:
    return numpy_states(params, spec, documents(LENGTH)[0]).logits


def has_shapes_of(spec: ModelSpec, params: Params) -> bool:
    wanted = jax.tree.map(jnp.shape, Decoder(spec=spec).abstract())
    return jax.tree.map(jnp.shape, params) == wanted


@pytest.mark.torch
@pytest.mark.parametrize("family", TELLING)
def test_every_key_of_transformers_class_is_read_or_refused_or_without_effect(
    saved: Any, family: str
) -> None:
    directory, model = saved(TELLING[family])
    config = json.loads((directory / "config.json").read_text())
    config.pop("layer_types", None)  # which other keys would otherwise lose against
    spec, params = families.spec_from_config(config), hf.load(directory)
    assert spec == hf.read_spec(directory)
    before = logits_with(params, spec)
    for key in {field.name for field in dataclasses.fields(type(model.config))} - WITHOUT_EFFECT:
        value = not config.get(key) if key in SWITCHES else OTHER_VALUES[key]
        assert value != config.get(key), key
        try:
            changed = families.spec_from_config(config | {key: value})
        except UserError:
            continue
        assert changed != spec, key
        if has_shapes_of(changed, params) and key != "max_position_embeddings":
            assert relative(logits_with(params, changed), before) > 1e-3, key


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("llama", "rope_theta", 600.0),
        ("llama", "factor", 4.0),
        ("llama", "low_freq_factor", 2.0),
        ("llama", "high_freq_factor", 8.0),
        ("llama", "original_max_position_embeddings", 64),
        ("llama_linear", "factor", 2.0),
        ("llama_longrope", "long_factor", [1.3, 2.0, 3.0, 5.0]),
        ("llama_longrope", "attention_factor", 1.5),
        ("llama_longrope", "factor", 9.0),
        ("llama_longrope", "original_max_position_embeddings", 30),
        ("phi3_short", "short_factor", [1.3, 2.0, 3.0, 5.0]),
        ("phi3", "partial_rotary_factor", 1.0),
        ("qwen3_biases", "factor", 2.0),
        ("qwen2_layer_types", "factor", 2.0),
        ("qwen2_layer_types", "beta_fast", 1.5),
        ("qwen2_layer_types", "beta_slow", 0.3),
        ("qwen2_layer_types", "truncate", False),
        ("qwen2_layer_types", "attention_factor", 1.5),
        ("qwen2_layer_types", "original_max_position_embeddings", 64),
        ("gemma3", "full_attention.rope_theta", 500.0),
        ("gemma3", "full_attention.factor", 2.0),
        ("gemma3", "sliding_attention.rope_theta", 500.0),
        ("gpt_neox", "partial_rotary_factor", 0.25),
        ("gpt_neox", "rope_theta", 600.0),
    ],
)
def test_every_number_of_rotary_positions_counts(
    saved: Any, name: str, path: str, value: Any
) -> None:
    directory, _ = saved(name)
    config = json.loads((directory / "config.json").read_text())
    spec, params = families.spec_from_config(config), hf.load(directory)
    *outer, key = path.split(".")
    target = config["rope_parameters"]
    for part in outer:
        target = target[part]
    assert target.get(key) != value
    target[key] = value
    config.pop(key, None)  # which would contradict it
    changed = families.spec_from_config(config)
    assert relative(logits_with(params, changed), logits_with(params, spec)) > 1e-3


# --- old files, new files, and what they leave out ------------------------------------------------

FULL, SLIDING = "full_attention", "sliding_attention"
LENGTH_KEY = "original_max_position_embeddings"
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONG = {"short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.2, 2.0, 3.0, 5.0]}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
OLD_AND_NEW: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": (
        "llama", {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "absent": ("qwen2", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000}}),
    "linear": (
        "llama", {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
    ),
    "llama3": (
        "llama", {"rope_theta": 500_000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3}},
    ),
    "yarn": (
        "qwen2", {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
    ),
    "yarn_without_the_length": (
        "qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
         | {"original_max_position_embeddings": 128}},
    ),
    "yarn_by_mscale": (
        "mistral",
        {"rope_scaling": {"type": "yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN, "mscale": 1.0}
         | {"mscale_all_dim": 0.5}},
    ),
    "longrope": (
        "phi3",
        {"original_max_position_embeddings": 32, "rope_scaling": {"type": "longrope", **LONG}},
        {"original_max_position_embeddings": 32}
        | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG}
           | {"original_max_position_embeddings": 32, "partial_rotary_factor": 1.0}},
    ),
    "longrope_in_a_llama": (
        "llama",
        {"original_max_position_embeddings": 32, "rope_scaling": {"rope_type": "longrope", **LONG}},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG}
         | {"original_max_position_embeddings": 32}},
    ),
    "part_of_a_head": (
        "gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 500},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}
         | {"partial_rotary_factor": 0.5}},
    ),
    "absent_part_of_a_head": (
        "gpt_neox", {},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    ),
    "part_of_a_phi": (
        "phi3", {"partial_rotary_factor": 0.5, "rope_theta": 500.0},
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ),
    "by_layer": (
        "gemma3_text",
        {"rope_theta": 1e5, "rope_local_base_freq": 500.0, "sliding_window_pattern": 3}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
            SLIDING: {"rope_type": "default", "rope_theta": 500.0},
        }} | {"layer_types": [FULL if i % 3 == 2 else SLIDING for i in range(7)]},
    ),
    "absent_by_layer": (
        "gemma3_text", {},
        {"rope_parameters": {FULL: {"rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4}}}
        | {"layer_types": [FULL if i == 5 else SLIDING for i in range(7)]},
    ),
    "windows": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 5},
        {"use_sliding_window": True, "sliding_window": 9}
        | {"layer_types": [FULL] * 5 + [SLIDING] * 2},
    ),
    "every_other_window": (
        "gemma2", {"sliding_window": 9},
        {"sliding_window": 9} | {"layer_types": [SLIDING, FULL] * 3 + [SLIDING]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OLD_AND_NEW)
def test_old_and_new_files_of_a_model_give_one_spec(case: str) -> None:
    model_type, old, new = OLD_AND_NEW[case]
    head_dim = {"head_dim": 8} if "gemma" in model_type or model_type == "qwen3" else {}
    base = {"model_type": model_type, **SIZES, **head_dim}
    spec = families.spec_from_config(base | old)
    assert families.spec_from_config(base | new) == spec
    written = families.config_from_spec(spec)
    assert families.spec_from_config(written) == spec
    # Each half of what we write is enough.
    names = {"rope_parameters"}
    if "num_key_value_heads" in written:  # learned positions aside
        halves = [
            {key: value for key, value in written.items() if key not in names},
            {key: value for key, value in written.items() if key != "rope_scaling"},
        ]
        assert [families.spec_from_config(half) for half in halves] == [spec, spec]


@pytest.mark.torch
@pytest.mark.parametrize("case", OLD_AND_NEW)
def test_transformers_reads_old_files_as_we_do_and_what_we_write(case: str) -> None:
    pytest.importorskip("torch")
    model_type, old, _ = OLD_AND_NEW[case]
    head_dim = {"head_dim": 8} if "gemma" in model_type or model_type == "qwen3" else {}
    base = {"model_type": model_type, **SIZES, **head_dim}
    spec = families.spec_from_config(base | old)
    for config in (base | old, families.config_from_spec(spec)):
        theirs = torch_models.transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
        assert families.spec_from_config(written_by_transformers(theirs)) == spec


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_old_names_of_longrope_mean_longrope_in_a_phi(name: str) -> None:
    old, new = (
        config_for("phi3", rope_scaling={"type": kind, **LONG}, **{LENGTH_KEY: 32})
        for kind in (name, "longrope")
    )
    spec = families.spec_from_config(old)
    assert spec == families.spec_from_config(new)
    assert spec.rope_scaling is not None and spec.rope_scaling.kind == "longrope"


@pytest.mark.torch
@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_a_file_leaves_out_has_the_default_of_transformers(family: str) -> None:
    pytest.importorskip("torch")
    model_type = families.FAMILIES[family].model_type
    if family == "mistral":  # its default of key/value heads goes with its own heads only
        assert families.spec_from_config({"model_type": model_type}).num_kv_heads == 8
    theirs = torch_models.transformers.AutoConfig.for_model(model_type)
    assert families.spec_from_config({"model_type": model_type}) == families.spec_from_config(
        written_by_transformers(theirs)
    )


@pytest.mark.parametrize("name", HUB)
def test_published_models_have_the_published_number_of_parameters(name: str) -> None:
    spec = families.spec_from_config(HUB[name].config)
    assert num_parameters(spec) == HUB[name].parameters
    assert families.spec_from_config(families.config_from_spec(spec)) == spec


def test_published_models_are_read_as_they_are_meant() -> None:
    specs = {name: families.spec_from_config(HUB[name].config) for name in HUB}
    assert specs["Llama-3.2-1B"].rope_scaling == RopeScaling(
        kind="llama3", factor=32.0, original_positions=8192
    )
    assert specs["Qwen1.5-14B"].pattern == ("global",) and specs["Qwen1.5-14B"].qkv_bias
    assert specs["gemma-3-1b"].pattern == ("local",) * 5 + ("global",)
    assert (specs["gemma-3-1b"].window, specs["gemma-3-1b"].local_rope_theta) == (512, 10_000.0)
    assert specs["gemma-2-2b"].pattern == ("local", "global")
    assert specs["gpt2"].tied_head and specs["gpt2"].ffn_size == 3072
    assert specs["starcoder"].num_kv_heads == 1 and specs["starcoder"].activation == "gelu"
    assert specs["pythia-70m"].rotary_width == 16 and specs["pythia-70m"].parallel_residual
    assert specs["Phi-3-mini-4k"].window == 2047


# --- what is refused ------------------------------------------------------------------------------


def config_for(model_type: str, **changes: Any) -> dict[str, Any]:
    """A small file that is read, and changes of it."""
    shape = SIZES if families.FAMILIES[model_type].prefix != "transformer." else {}
    head_dim = {"head_dim": 8} if "gemma" in model_type or model_type == "qwen3" else {}
    return {"model_type": model_type, **shape, **head_dim, **changes}


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu' is not supported"),
        ("llama", {"hidden_size": "32"}, "hidden_size = '32': expected a positive integer"),
        ("llama", {"hidden_size": None}, "hidden_size = None: expected a positive integer"),
        ("llama", {"vocab_size": 0}, "vocab_size = 0"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers = True"),
        ("llama", {"num_hidden_layers": 10**9}, "1000000000 layers: expected at most"),
        ("llama", {"num_key_value_heads": 3}, "not a multiple of num_kv_heads"),
        ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps = nan"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
        ("llama", {"head_dim": 7}, "needs an even number"),
        ("llama", {"sliding_window": 5}, "sliding_window = 5 is not supported"),
        ("llama", {"layer_types": [SLIDING] * 7}, "no sliding_attention"),
        ("llama", {"layer_types": [FULL] * 6}, "expected 7 times one of"),
        ("llama", {"layer_types": ["chunked_attention"] * 7}, "expected 7 times one of"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = .* only null"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder = True .* only false"),
        ("llama", {"is_causal": False}, "is_causal = False"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved = True"),
        ("llama", {"per_layer_config": [{}]}, "per_layer_config"),
        ("llama", {"rope_parameters": [1]}, "expected an object"),
        ("llama", {"rope_parameters": {FULL: {"rope_theta": 1}}}, "gemma3_text only"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type dynamic is not"),
        ("llama", {"rope_scaling": {"rope_type": "axial"}}, "rope_type axial is not supported"),
        ("llama", {"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "yarn and linear is"),
        ("llama", {"rope_scaling": {"type": 3}}, "expected the name of a rope_type"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor = None"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling.factor = -1"),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
        ("llama", {"rope_scaling": {"mrope_section": [1, 1, 2]}}, "'mrope_section' is not"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
            "high_freq_factor must be larger",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "longrope", **LONG, "short_factor": [1.0]}},
            "short_factor = .1.0.: expected a list of 4 numbers",
        ),
        (
            "llama",
            {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 300.0}},
            "rope_theta = 7, rope_parameters.rope_theta = 300: these must be equal",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default"}}
            | {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters = .*, rope_scaling = .*: these must say the same",
        ),
        (
            "llama",
            {"original_max_position_embeddings": 16, "rope_scaling": {"rope_type": "yarn", **YARN}},
            "original_max_position_embeddings = 16, rope_scaling.original_max_.* = 32",
        ),
        (
            "phi3",  # where the outer length counts, even if it is left out
            {"rope_scaling": {"type": "longrope", **LONG, **YARN}},
            "original_max_position_embeddings = 4096, .* = 32",
        ),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type linear is not"),
        ("phi3", {"head_dim": 16}, "head_dim = 16: the heads of this model share"),
        ("mistral", {"layer_types": [FULL] * 7}, "do not go with sliding_window = 4096"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0"),
        ("qwen2", {"layer_types": [SLIDING] * 7}, "needs use_sliding_window"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers = -1"),
        ("starcoder2", {"norm_type": "rms_norm"}, "norm_type = 'rms_norm' .* only .layer_norm."),
        ("starcoder2", {"mlp_type": "gated"}, "mlp_type = 'gated'"),
        ("gemma2", {"hidden_act": "gelu"}, "hidden_act = 'gelu' contradicts"),
        ("gemma2", {"sliding_window": None}, "needs sliding_window"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "one object for full_attention"),
        ("gemma3_text", {"rope_parameters": {FULL: 3}}, "rope_parameters.full_attention = 3"),
        (
            "gemma3_text",
            {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention: only rope_type 'default'",
        ),
        (
            "gemma3_text",
            {"rope_local_base_freq": 5.0, "rope_parameters": {SLIDING: {"rope_theta": 6.0}}},
            "rope_local_base_freq = 5, rope_parameters.sliding_attention.rope_theta = 6",
        ),
        (
            "gemma3_text",
            {"rope_scaling": {"rope_type": "yarn", **YARN, "truncate": False}},
            "truncate = False has no effect",
        ),
        ("gpt2", {"n_embd": 30, "n_head": 4}, "hidden size 30 is not a multiple of 4"),
        ("gpt2", {"n_embd": 32, "hidden_size": 48}, "n_embd = 32, hidden_size = 48"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("gpt_neox", {"rope_theta": 500.0}, "rope_theta = 500.0 contradicts rope_theta = 10000.0"),
        ("gpt_neox", {"rotary_pct": 1.5}, "rope_fraction = 1.5"),
        ("gpt_neox", {"partial_rotary_factor": 0.5}, "contradicts rope_fraction = 0.25"),
    ],
)
def test_configs_that_are_not_supported_are_refused(
    model_type: str, changes: dict[str, Any], said: str
) -> None:
    families.spec_from_config(config_for(model_type))
    with pytest.raises(UserError, match=said):
        families.spec_from_config(config_for(model_type, **changes))


@pytest.mark.parametrize(
    ("architectures", "model_type", "said"),
    [
        (["MixtralForCausalLM"], "mixtral", "mixture of experts .* nearest .* MistralForCausalLM"),
        (["OtherMoeForCausalLM"], "other_moe", "mixture of experts is not supported"),
        (["Gemma3ForConditionalGeneration"], "gemma3", "images and text .* model_type gemma3_text"),
        (["GPT2Model"], "gpt2", "not a causal language model; GPT2LMHeadModel is supported"),
        (["LlamaForSequenceClassification"], "llama", "not a causal language model"),
        (["GPT2LMHeadModel"], "llama", "a GPT2LMHeadModel has another model_type"),
        (["LlamaForCausalLM", "Other"], "llama", "another model_type; correct"),
        (["UnheardOf"], "unheard_of", "not supported; supported are LlamaForCausalLM, .*GPTNeoX"),
        (None, "unheard_of", "model_type = 'unheard_of': not supported"),
        (None, None, "model_type = None"),
        (3, ["llama"], "architectures = 3"),
    ],
)
def test_unknown_architectures_are_refused_with_the_nearest_one(
    architectures: Any, model_type: Any, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        families.spec_from_config({"architectures": architectures, "model_type": model_type})


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
_ROPE_KEYS = [
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", FULL, SLIDING,
    "attention_factor", "beta_fast", "short_factor", "long_factor", "low_freq_factor", "mscale",
    "high_freq_factor", "partial_rotary_factor", "truncate", "mscale_all_dim",
]  # fmt: skip
_ROPE = st.dictionaries(
    st.sampled_from(_ROPE_KEYS),
    st.sampled_from(["linear", "llama3", "yarn", "longrope", 4.0, 8, None, [1.0] * 4]) | _JSON,
)
_LIKELY = st.sampled_from([1, 2, 4, 0.5, 1e-6, "gelu", [SLIDING] * 7, [FULL] * 7]) | _ROPE | _JSON


@given(
    family=st.sampled_from(sorted(families.FAMILIES)),
    data=st.data(),
)
def test_any_values_of_keys_give_a_spec_or_one_line_that_says_why(
    family: str, data: st.DataObject
) -> None:
    config = families.config_from_spec(families.spec_from_config(config_for(family)))
    known = [*config, "layer_types", "rope_scaling", "original_max_position_embeddings"]
    changes = data.draw(st.dictionaries(st.sampled_from(known), _LIKELY, min_size=1, max_size=2))
    try:
        spec = families.spec_from_config(config | changes)
    except UserError as error:
        assert "\n" not in str(error)
        return
    try:
        written = families.config_from_spec(spec)
    except UserError as error:
        assert "transformers refuses" in str(error)
        return
    assert families.spec_from_config(json.loads(json.dumps(written))) == spec


# --- export ---------------------------------------------------------------------------------------

SPEC = ModelSpec(
    vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=48,
    tied_head=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qk_norm": "head"}, "'llama' cannot express qk_norm = 'head'; qwen3 can"),
        ({"qk_norm": "all"}, "cannot express qk_norm = 'all'; olmo2 can"),
        ({"logit_softcap": 3.0}, "logit_softcap = 3.0; gemma2, gemma3_text can"),
        ({"rope_fraction": 0.5}, "cannot express rope_fraction = 0.5; phi3 can"),
        ({"qkv_bias": True}, "cannot express out_bias = False; qwen2 can"),
        (
            {"pattern": ("local", "global"), "window": 4},
            r"pattern = \('local', 'global'\), window = 4; qwen2, qwen3, gemma2, gemma3_text can",
        ),
        ({"norm": "layer"}, "norm = 'layer'; gpt2, gpt_bigcode, starcoder2, gpt_neox can"),
        ({"positions": "learned"}, "positions = 'learned'; gpt2"),
        (
            {"qk_norm": "all", "norm": "layer"},
            "qk_norm = 'all', norm = 'layer'; the families that can are qk_norm: olmo2; norm: gpt2",
        ),
        ({"hidden_size": 30, "head_dim": 8}, "hidden_size = 30 is not a multiple"),
        ({"family": "gpt"}, "family 'gpt' is not one of llama"),
        ({"family": "qwen2"}, "cannot express qkv_bias = False"),
        ({"family": "gemma2", "attention_scale": 0.3}, "attention_scale = 0.3"),
        ({"family": "gpt2"}, "norm = 'rms'"),
        ({"family": "gpt_bigcode"}, "num_kv_heads = 2"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        (
            {"family": "gemma3_text", "pattern": ("local", "global"), "window": 4}
            | {"rope_scaling": RopeScaling(kind="linear", factor=2.0)},
            "local layers of Gemma 3 are not stretched",
        ),
        (
            {"family": "phi3", "rope_scaling": RopeScaling(kind="linear", factor=2.0)},
            "rope_type linear is not supported, only default, longrope",
        ),
    ],
)
def test_specs_that_a_familys_files_cannot_express_are_refused(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        families.config_from_spec(dataclasses.replace(SPEC, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pattern": ("global",) * 3},
        {"attention_scale": 8**-0.5},
        {"window": 9, "local_rope_theta": 5.0},  # of no effect without local layers
        {"rope_scaling": RopeScaling(kind="linear", factor=2.0, original_positions=64)},
        {"family": "mistral", "pattern": ("local", "local"), "window": 9},
        {"family": "gpt_neox", "num_kv_heads": 4, "rope_theta": 7.0, "norm": "layer"}
        | {"gated_mlp": False, "mlp_bias": True},
        {"family": "gpt2", "num_kv_heads": 4, "rope_theta": 7.0, "norm": "layer"}
        | {"gated_mlp": False, "mlp_bias": True, "qkv_bias": True, "out_bias": True}
        | {"positions": "learned"},
    ],
)
def test_what_has_no_effect_is_exported_as_its_default(changes: dict[str, Any]) -> None:
    spec = dataclasses.replace(SPEC, **changes)
    again = families.spec_from_config(families.config_from_spec(spec))
    assert again == families.canonical(spec) == families.canonical(again)
    params = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, leaf.dtype), Decoder(spec=again).abstract()
    )
    assert has_shapes_of(again, params)


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [
        ("GGG", "G"),
        ("LGLGL", "LG"),
        ("LLLLLGLLLLLGLL", "LLLLLG"),
        ("LLLL", "L"),
        ("GGLLL", "GGLLL"),  # not periodic
        ("LGG", "LGG"),
        ("LGGLGGL", "LGG"),
    ],
)
def test_a_pattern_is_the_shortest_period_of_the_layer_types(kinds: str, pattern: str) -> None:
    types = [FULL if kind == "G" else SLIDING for kind in kinds]
    config = config_for("gemma2", num_hidden_layers=len(kinds), layer_types=types)
    spec = families.spec_from_config(config)
    assert spec.pattern == tuple("global" if kind == "G" else "local" for kind in pattern)
    assert families.config_from_spec(spec)["layer_types"] == types


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("name", VARIANTS)
def test_placements_cover_every_parameter_and_every_row_of_the_tensors_once(name: str) -> None:
    config = written_by_transformers(torch_models.config_of(VARIANTS[name]))
    spec = families.spec_from_config(config)
    places = families.placements(spec)
    paths = {tuple(key.key for key in path) for path, _ in
             jax.tree_util.tree_leaves_with_path(Decoder(spec=spec).abstract())}  # fmt: skip
    assert {place.path for place in places} == paths
    assert len({(place.path, place.period) for place in places}) == len(places)
    rows: dict[str, list[int]] = {}
    for place in places:
        if place.rows is None:
            assert [other.name for other in places].count(place.name) == 1
            continue
        groups, start, size, total = place.rows
        counted = rows.setdefault(place.name, [0] * groups * total)
        for group in range(groups):
            for row in range(group * total + start, group * total + start + size):
                counted[row] += 1
    assert all(set(counted) == {1} for counted in rows.values())


@pytest.mark.torch
@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode"])
def test_files_of_a_bare_model_with_its_masks_are_read(
    saved: Any, name: str, tmp_path: Path
) -> None:
    directory, _ = saved(name)
    tensors = {
        key.removeprefix("transformer."): tensor
        for key, tensor in load_file(directory / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 96, 96), np.float32))
    tensors["h.0.attn.masked_bias"] = np.full((), -1e4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path), hf.load(directory))


@pytest.mark.torch
def test_the_head_of_gpt_neox_has_two_names(saved: Any, tmp_path: Path) -> None:
    directory, _ = saved("gpt_neox")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path), hf.load(directory))
