"""GPT-2, gpt_bigcode (StarCoder 1) and GPT-NeoX (Pythia): layer norms, plain MLPs, fused tensors.

The defaults are those of transformers' config classes.
"""

from __future__ import annotations

from ddk_jax.models.families.llama import WRITTEN, shape
from ddk_jax.models.families.reading import (
    EVERYWHERE,
    Echo,
    Key,
    ManyHeads,
    MultiQuery,
    Only,
    ScaleSwitch,
    SharedWidth,
    four_times,
    number,
)
from ddk_jax.models.families.rope import Rope
from ddk_jax.models.families.table import Family, Part, Rows, TensorRule, Tensors, matrix, norm
from ddk_jax.models.families.windows import NoWindows
from ddk_jax.models.spec import ModelSpec

_BIASED = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
_PLAIN = {"norm": "layer", "gated_mlp": False}


def _per_head(spec: ModelSpec) -> dict[str, Rows]:
    """Every head's queries, keys and values follow each other."""
    H, D = spec.num_heads, spec.head_width
    return {name: Rows(H, i * D, D, 3 * D) for i, name in enumerate("qkv")}


def _one_behind_another(spec: ModelSpec) -> dict[str, Rows]:
    """All queries, then all keys, then all values."""
    queries, keys = spec.num_heads * spec.head_width, spec.num_kv_heads * spec.head_width
    total = queries + 2 * keys
    starts = {"q": (0, queries), "k": (queries, keys), "v": (queries + keys, keys)}
    return {name: Rows(1, start, size, total) for name, (start, size) in starts.items()}


def _gpt2_tensors(spec: ModelSpec, *, conv: bool, rows: dict[str, Rows]) -> Tensors:
    place = "transformer.h.{layer}."
    layer = norm(spec, "attn_norm", place + "ln_1")
    for name, part in rows.items():
        layer += matrix(
            ("attn", name), place + "attn.c_attn", bias=spec.qkv_bias, conv=conv, rows=part
        )
    layer += matrix(("attn", "o"), place + "attn.c_proj", inputs=2, bias=spec.out_bias, conv=conv)
    layer += norm(spec, "mlp_norm", place + "ln_2")
    layer += matrix(("mlp", "up"), place + "mlp.c_fc", bias=spec.mlp_bias, conv=conv)
    layer += matrix(("mlp", "down"), place + "mlp.c_proj", bias=spec.mlp_bias, conv=conv)
    return Tensors(
        top=[
            TensorRule(("embed", "table"), "transformer.wte.weight"),
            TensorRule(("embed", "positions"), "transformer.wpe.weight"),
            *norm(spec, "norm", "transformer.ln_f"),
        ],
        head=TensorRule(("head", "kernel"), "lm_head.weight", 1),
        layer=layer,
    )


def _bigcode_tensors(spec: ModelSpec) -> Tensors:
    rows = _one_behind_another(spec) if spec.num_kv_heads == 1 else _per_head(spec)
    return _gpt2_tensors(spec, conv=False, rows=rows)


def _neox_tensors(spec: ModelSpec) -> Tensors:
    place = "gpt_neox.layers.{layer}."
    layer = norm(spec, "attn_norm", place + "input_layernorm")
    layer += norm(spec, "mlp_norm", place + "post_attention_layernorm")
    for name, rows in _per_head(spec).items():
        layer += matrix(
            ("attn", name), place + "attention.query_key_value", bias=spec.qkv_bias, rows=rows
        )
    layer += matrix(("attn", "o"), place + "attention.dense", inputs=2, bias=spec.out_bias)
    layer += matrix(("mlp", "up"), place + "mlp.dense_h_to_4h", bias=spec.mlp_bias)
    layer += matrix(("mlp", "down"), place + "mlp.dense_4h_to_h", bias=spec.mlp_bias)
    return Tensors(
        top=[
            TensorRule(("embed", "table"), "gpt_neox.embed_in.weight"),
            *norm(spec, "norm", "gpt_neox.final_layer_norm"),
        ],
        head=TensorRule(("head", "kernel"), "embed_out.weight", 1),
        layer=layer,
    )


def _gpt2_parts(activation: str, *more: Part) -> tuple[Part, ...]:
    return (
        Key("vocab_size", "vocab_size", 50_257),
        Key("n_embd", "hidden_size", 768, alias="hidden_size"),
        Key("n_layer", "num_layers", 12, alias="num_hidden_layers"),
        Key("n_head", "num_heads", 12, alias="num_attention_heads"),
        Key("n_inner", "ffn_size", four_times, null=four_times),
        Key("n_positions", "max_positions", 1024, alias="max_position_embeddings"),
        SharedWidth(),
        Key("activation_function", "activation", activation),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("tie_word_embeddings", "tied_head", True),
        *more,
        ScaleSwitch(),
        NoWindows(),
        *EVERYWHERE,
    )


_GPT2_WRITTEN = {
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "pad_token_id": None,
}

GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    always={**_PLAIN, **_BIASED, "positions": "learned"},
    # `reorder_and_upcast_attn` computes the scores in float32, as we always do.
    parts=_gpt2_parts(
        "gelu_new", ManyHeads(), Only("scale_attn_by_inverse_layer_idx", False, written=True)
    ),
    written=_GPT2_WRITTEN,
    tensors=lambda spec: _gpt2_tensors(spec, conv=True, rows=_one_behind_another(spec)),
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
    even_heads=True,
)

BIGCODE = Family(
    name="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    model_type="gpt_bigcode",
    always={**_PLAIN, **_BIASED, "positions": "learned"},
    # Likewise its keys that ask for a softmax in float32.
    parts=_gpt2_parts("gelu_pytorch_tanh", MultiQuery()),
    written=_GPT2_WRITTEN,
    tensors=_bigcode_tensors,
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
    even_heads=True,
)

NEOX = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    always={**_PLAIN, "mlp_bias": True},
    parts=(
        *shape(50_432, 6144, 24_576, 44, 64, 2048),
        ManyHeads(),
        SharedWidth(),
        Key("layer_norm_eps", "norm_eps", 1e-5),
        Key("hidden_act", "activation", "gelu"),
        Key("tie_word_embeddings", "tied_head", False),
        Key("use_parallel_residual", "parallel_residual", True),
        Key("attention_bias", "qkv_bias", True, also=("out_bias",)),
        Rope(theta_key="rotary_emb_base", fraction_key="rotary_pct", fraction=0.25),
        # Names that other families have, and that some files repeat.
        Echo("rope_theta", "rope_theta", number),
        Echo("partial_rotary_factor", "rope_fraction", number),
        NoWindows(),
        *EVERYWHERE,
    ),
    written={**WRITTEN, "hidden_dropout": 0.0},
    tensors=_neox_tensors,
    prefix="gpt_neox.",
    renamed={"lm_head.weight": "embed_out.weight"},
    ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    even_heads=True,
)
