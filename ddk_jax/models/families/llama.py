"""Llama and those that share its names: Mistral, Qwen, OLMo 2, Phi-3 and StarCoder2.

The defaults are those of transformers' config classes.
"""

from __future__ import annotations

from ddk_jax.models.families.reading import EVERYWHERE, Key, Only, SharedWidth, heads, width
from ddk_jax.models.families.rope import Rope
from ddk_jax.models.families.table import Family, Part, Rows, TensorRule, Tensors, matrix, norm
from ddk_jax.models.families.windows import NoWindows, OneWindow, UpperWindows
from ddk_jax.models.spec import ModelSpec

LAYER = "model.layers.{layer}."
WRITTEN = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    # An absent key would mean the id in transformers' defaults, which may be beyond the vocabulary.
    "pad_token_id": None,
}

_NORMS = {
    "pre": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {
        "attn_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attn_norm": "input_layernorm",
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}


def shape(
    vocab: int, hidden: int, ffn: int, layers: int, query_heads: int, positions: int
) -> tuple[Key, ...]:
    """The keys that almost all files have, with the defaults of the class."""
    return (
        Key("vocab_size", "vocab_size", vocab),
        Key("hidden_size", "hidden_size", hidden),
        Key("intermediate_size", "ffn_size", ffn),
        Key("num_hidden_layers", "num_layers", layers),
        Key("num_attention_heads", "num_heads", query_heads),
        Key("max_position_embeddings", "max_positions", positions),
    )


def norms(spec: ModelSpec) -> list[TensorRule]:
    """The norms of a layer."""
    placed = _NORMS[spec.norm_placement]
    return [rule for path, name in placed.items() for rule in norm(spec, path, LAYER + name)]


def attention(spec: ModelSpec) -> list[TensorRule]:
    """The four matrices, and the norms of queries and keys."""
    place = LAYER + "self_attn."
    rules = [
        rule
        for name in "qkv"
        for rule in matrix(("attn", name), f"{place}{name}_proj", bias=spec.qkv_bias)
    ]
    rules += matrix(("attn", "o"), place + "o_proj", inputs=2, bias=spec.out_bias)
    if spec.qk_norm != "none":
        # One vector over all heads is stored flat.
        inputs = 0 if spec.qk_norm == "all" else None
        rules += [
            TensorRule(("attn", f"{name}_norm", "scale"), f"{place}{name}_norm.weight", inputs)
            for name in "qk"
        ]
    return rules


def gated_mlp(spec: ModelSpec) -> list[TensorRule]:
    """The three matrices."""
    return [
        rule
        for name in ("gate", "up", "down")
        for rule in matrix(("mlp", name), f"{LAYER}mlp.{name}_proj", bias=spec.mlp_bias)
    ]


def whole(spec: ModelSpec, layer: list[TensorRule]) -> Tensors:
    """A model with these tensors in a layer."""
    return Tensors(
        top=[
            TensorRule(("embed", "table"), "model.embed_tokens.weight"),
            *norm(spec, "norm", "model.norm"),
        ],
        head=TensorRule(("head", "kernel"), "lm_head.weight", 1),
        layer=layer,
    )


def tensors(spec: ModelSpec) -> Tensors:
    """Of Llama and all whose layers differ from it in biases and norms only."""
    return whole(spec, [*norms(spec), *attention(spec), *gated_mlp(spec)])


def _starcoder2_tensors(spec: ModelSpec) -> Tensors:
    mlp = [
        *matrix(("mlp", "up"), LAYER + "mlp.c_fc", bias=spec.mlp_bias),
        *matrix(("mlp", "down"), LAYER + "mlp.c_proj", bias=spec.mlp_bias),
    ]
    return whole(spec, [*norms(spec), *attention(spec), *mlp])


def _phi3_tensors(spec: ModelSpec) -> Tensors:
    queries, keys = spec.num_heads * spec.head_width, spec.num_kv_heads * spec.head_width
    total, inner = queries + 2 * keys, spec.ffn_size
    cuts = {"q": (0, queries), "k": (queries, keys), "v": (queries + keys, keys)}
    layer = norms(spec)
    for name, (start, size) in cuts.items():
        rows = Rows(1, start, size, total)
        layer += matrix(("attn", name), LAYER + "self_attn.qkv_proj", rows=rows)
    layer += matrix(("attn", "o"), LAYER + "self_attn.o_proj", inputs=2)
    for i, name in enumerate(("gate", "up")):
        rows = Rows(1, i * inner, inner, 2 * inner)
        layer += matrix(("mlp", name), LAYER + "mlp.gate_up_proj", rows=rows)
    layer += matrix(("mlp", "down"), LAYER + "mlp.down_proj")
    return whole(spec, layer)


_ATTENTION_BIAS = Key("attention_bias", "qkv_bias", False, also=("out_bias",))
_HEAD_DIM = Key("head_dim", "head_dim", width, null=width)
_EPS_6 = Key("rms_norm_eps", "norm_eps", 1e-6)
_EPS_5 = Key("rms_norm_eps", "norm_eps", 1e-5)
_SILU = Key("hidden_act", "activation", "silu")
_UNTIED = Key("tie_word_embeddings", "tied_head", False)

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    parts=(
        *shape(32_000, 4096, 11_008, 32, 32, 2048),
        Key("num_key_value_heads", "num_kv_heads", heads, null=heads),
        _HEAD_DIM,
        _EPS_6,
        _SILU,
        _UNTIED,
        _ATTENTION_BIAS,
        Key("mlp_bias", "mlp_bias", False),
        Only("rope_interleaved", False),  # in files that nanotron wrote
        Rope(),
        NoWindows(),
        *EVERYWHERE,
    ),
    written={**WRITTEN, "pretraining_tp": 1},
    tensors=tensors,
    prefix="model.",
    even_heads=True,
)

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    parts=(
        *shape(32_000, 4096, 14_336, 32, 32, 131_072),
        Key("num_key_value_heads", "num_kv_heads", 8, null=heads),
        _HEAD_DIM,
        _EPS_6,
        _SILU,
        _UNTIED,
        Rope(),
        OneWindow(4096),
        *EVERYWHERE,
    ),
    written=WRITTEN,
    tensors=tensors,
    prefix="model.",
)


def _qwen(head_dim: Key, *more: Key) -> tuple[Part, ...]:
    return (
        *shape(151_936, 4096, 22_016, 32, 32, 32_768),
        Key("num_key_value_heads", "num_kv_heads", 32, null=heads),
        head_dim,
        _EPS_6,
        _SILU,
        _UNTIED,
        *more,
        Rope(),
        UpperWindows(),
        *EVERYWHERE,
    )


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    always={"qkv_bias": True},
    parts=_qwen(_HEAD_DIM),
    written=WRITTEN,
    tensors=tensors,
    prefix="model.",
)

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    always={"qk_norm": "head"},
    parts=_qwen(Key("head_dim", "head_dim", 128, null=width), _ATTENTION_BIAS),
    written=WRITTEN,
    tensors=tensors,
    prefix="model.",
)

OLMO2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    always={"qk_norm": "all", "norm_placement": "post"},
    parts=(
        *shape(50_304, 4096, 11_008, 32, 32, 2048),
        Key("num_key_value_heads", "num_kv_heads", heads, null=heads),
        _HEAD_DIM,
        _EPS_5,
        _SILU,
        _UNTIED,
        _ATTENTION_BIAS,
        Rope(),
        NoWindows(),
        *EVERYWHERE,
    ),
    written=WRITTEN,
    tensors=tensors,
    prefix="model.",
)

PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    parts=(
        *shape(32_064, 3072, 8192, 32, 32, 4096),
        Key("num_key_value_heads", "num_kv_heads", heads, null=heads),
        SharedWidth(),
        _EPS_5,
        _SILU,
        _UNTIED,
        Rope(
            fraction_key="partial_rotary_factor",
            # What is not longrope in an old file is an old name of it.
            kinds=dict.fromkeys(("longrope", "su", "yarn"), "longrope"),
            length=4096,
        ),
        OneWindow(),
        *EVERYWHERE,
    ),
    written={**WRITTEN, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    tensors=_phi3_tensors,
    prefix="model.",
)

STARCODER2 = Family(
    name="starcoder2",
    architecture="Starcoder2ForCausalLM",
    model_type="starcoder2",
    always={"norm": "layer", "gated_mlp": False},
    parts=(
        *shape(49_152, 3072, 12_288, 30, 24, 4096),
        Key("num_key_value_heads", "num_kv_heads", 2, null=heads),
        _HEAD_DIM,
        Key("norm_epsilon", "norm_eps", 1e-5),
        Key("hidden_act", "activation", "gelu_pytorch_tanh"),
        Key("tie_word_embeddings", "tied_head", True),
        Key("use_bias", "qkv_bias", True, also=("out_bias", "mlp_bias")),
        Only("norm_type", "layer_norm"),
        Only("mlp_type", "default"),
        Rope(),
        OneWindow(),
        *EVERYWHERE,
    ),
    written={**WRITTEN, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    tensors=_starcoder2_tensors,
    prefix="model.",
)
