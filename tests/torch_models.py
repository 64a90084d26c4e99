"""Random small models of every family, made by transformers on torch: the reference of parity.

Not a test. Importing it skips the caller where torch is not installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    # No token stops the reference's generation, and none is padding.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODERN = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2}
GPT = SHAPE | {"n_inner": 48}
GEMMA = MODERN | {"head_dim": 16, "query_pre_attn_scalar": 24}


class Variant(NamedTuple):
    """A model, by its family and what differs from the shape above.

    Attributes:
      model_type: transformers' name of the family.
      config: all keys.
      is_slow: whether its tests are among the slow ones.
    """

    model_type: str
    config: dict[str, Any]
    is_slow: bool = True


def rope(kind: str = "default", theta: float = 300.0, **numbers: Any) -> dict[str, Any]:
    """Rotary positions as new files have them."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **numbers}}


LLAMA3 = rope(
    "llama3", 500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=200, beta_fast=4.0)


def longrope(original: int) -> dict[str, Any]:
    """Of heads with 4 pairs."""
    return rope(
        "longrope", short_factor=[1.0, 1.1, 1.5, 2.0], long_factor=[1.2, 2.0, 3.0, 5.0],
        original_max_position_embeddings=original,
    )  # fmt: skip


VARIANTS: dict[str, Variant] = {
    "llama": Variant("llama", MODERN | LLAMA3 | {"head_dim": 16}, False),
    "llama_tied": Variant(
        "llama", MODERN | {"tie_word_embeddings": True, "rms_norm_eps": 1e-2} | rope()
    ),
    "llama_biases": Variant(
        "llama",
        MODERN | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}
        | {"num_key_value_heads": 1},
    ),
    "llama_linear": Variant(
        "llama", MODERN | rope("linear", factor=4.0) | {"num_key_value_heads": 4}
    ),
    "llama_longrope": Variant("llama", MODERN | longrope(24)),
    "qwen2": Variant("qwen2", MODERN | rope(theta=1000.0), False),
    "qwen2_upper_windows": Variant(
        "qwen2",
        MODERN | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2_layer_types": Variant(
        "qwen2",
        MODERN | YARN | {"use_sliding_window": True, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen3": Variant(
        "qwen3",
        MODERN
        | {"head_dim": 16, "tie_word_embeddings": True}
        | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3_biases": Variant("qwen3", MODERN | {"head_dim": 6, "attention_bias": True} | YARN),
    "mistral": Variant("mistral", MODERN | {"sliding_window": 6}),
    "mistral_unwindowed": Variant(
        "mistral", MODERN | rope() | {"sliding_window": None, "head_dim": 16}
    ),
    "phi3": Variant("phi3", MODERN | {"sliding_window": 9, "partial_rotary_factor": 0.5}),
    "phi3_short": Variant(
        "phi3", MODERN | longrope(64) | {"original_max_position_embeddings": 64}
    ),
    "phi3_long": Variant("phi3", MODERN | longrope(24) | {"original_max_position_embeddings": 24}),
    "olmo2": Variant("olmo2", MODERN | rope(theta=1000.0)),
    "olmo2_biases": Variant(
        "olmo2", MODERN | {"attention_bias": True, "tie_word_embeddings": True}
    ),
    "gemma2": Variant(
        "gemma2",
        GEMMA | {"num_hidden_layers": 5, "sliding_window": 6}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    ),
    "gemma2_uncapped": Variant(
        "gemma2",
        GEMMA | {"attention_bias": True, "sliding_window": 6, "query_pre_attn_scalar": 16}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": Variant(
        "gemma3_text",
        GEMMA | {"num_hidden_layers": 7, "sliding_window": 5, "sliding_window_pattern": 3}
        | {"num_key_value_heads": 1, "final_logit_softcapping": 4.0}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            }
        },
        False,
    ),
    "gemma3_layer_types": Variant(
        "gemma3_text",
        GEMMA | {"tie_word_embeddings": False, "sliding_window": 4}
        | {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt2": Variant("gpt2", GPT, False),
    "gpt2_unscaled": Variant(
        "gpt2",
        GPT | {"n_inner": None, "scale_attn_weights": False, "activation_function": "relu"}
        | {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-2},
    ),
    "gpt_bigcode": Variant("gpt_bigcode", GPT),
    "gpt_bigcode_many": Variant("gpt_bigcode", GPT | {"multi_query": False}),
    "starcoder2": Variant("starcoder2", MODERN | rope() | {"sliding_window": 9}),
    "starcoder2_unbiased": Variant(
        "starcoder2", MODERN | {"use_bias": False, "tie_word_embeddings": False}
    ),
    "gpt_neox": Variant("gpt_neox", MODERN | rope(partial_rotary_factor=0.5), False),
    "gpt_neox_sequential": Variant(
        "gpt_neox",
        MODERN | {"use_parallel_residual": False, "attention_bias": False}
        | {"tie_word_embeddings": True, "hidden_act": "gelu_new"}
        | rope("linear", factor=2.0, partial_rotary_factor=0.25),
    ),
}  # fmt: skip
"""The families, each with what users of it get wrong most easily."""


def config_of(variant: Variant) -> Any:
    """transformers' config."""
    return transformers.AutoConfig.for_model(variant.model_type, **variant.config)


def random_model(directory: Path, variant: Variant, seed: int = 0, dtype: Any = None) -> Any:
    """A model with weights large enough that attention is far from uniform, also saved."""
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_config(
        config_of(variant), attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    norm_mean = 0.0 if "gemma" in variant.model_type else 1.0  # Gemma's add 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, scale = 0.0, 0.25
            if name.endswith("weight") and ("norm" in name or "ln_" in name):
                mean, scale = norm_mean, 0.3
            parameter.copy_(mean + scale * torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(directory)
    return model


def forward(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, T, V]; the input of every layer and the final hidden states [L + 1, B, T, E]."""
    with torch.no_grad():
        out = model(torch.from_numpy(tokens.astype(np.int64)), output_hidden_states=True)
    return out.logits.numpy(), np.stack([hidden.numpy() for hidden in out.hidden_states])
