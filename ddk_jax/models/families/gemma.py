"""Gemma 2 and the text models of Gemma 3: norms before and behind, local and global layers."""

from __future__ import annotations

from ddk_jax.models.families.llama import WRITTEN, shape, tensors
from ddk_jax.models.families.reading import (
    EVERYWHERE,
    Echo,
    Key,
    Only,
    QueryScale,
    activation,
    heads,
    width,
)
from ddk_jax.models.families.rope import LayerRope, Rope
from ddk_jax.models.families.table import Family, Part
from ddk_jax.models.families.windows import EveryNth

_ALWAYS = {"norm_plus_one": True, "norm_placement": "both", "scaled_embedding": True}


def _parts(vocab: int, positions: int, *more: Part) -> tuple[Part, ...]:
    return (
        *shape(vocab, 2304, 9216, 26, 8, positions),
        Key("num_key_value_heads", "num_kv_heads", 4, null=heads),
        Key("head_dim", "head_dim", 256, null=width),
        Key("rms_norm_eps", "norm_eps", 1e-6),
        Key("hidden_activation", "activation", "gelu_pytorch_tanh"),
        Echo("hidden_act", "activation", activation),
        Key("tie_word_embeddings", "tied_head", True),
        Key("attention_bias", "qkv_bias", False, also=("out_bias",)),
        QueryScale(256),
        *more,
        *EVERYWHERE,
    )


GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    always=_ALWAYS,
    parts=_parts(
        256_000,
        8192,
        Key("attn_logit_softcapping", "attention_softcap", 50.0, null=0.0),
        Key("final_logit_softcapping", "logit_softcap", 30.0, null=0.0),
        EveryNth(2),
        Rope(),
    ),
    written=WRITTEN,
    tensors=tensors,
    prefix="model.",
    even_heads=True,
)

GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    always=_ALWAYS | {"qk_norm": "head"},
    parts=_parts(
        262_208,
        131_072,
        # transformers has the key and does not use it.
        Only("attn_logit_softcapping", None),
        Key("final_logit_softcapping", "logit_softcap", 0.0, null=0.0),
        EveryNth(6, key="sliding_window_pattern"),
        LayerRope(),
    ),
    written=WRITTEN,
    tensors=tensors,
    prefix="model.",
    even_heads=True,
)
