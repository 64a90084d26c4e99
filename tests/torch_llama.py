"""Random small Llamas made by transformers on torch: the reference of the parity tests.

Not a test. Importing it skips the caller where torch is not installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-6,
    # No token stops the reference's generation.
    "bos_token_id": None,
    "eos_token_id": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "wide_heads": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    },
    "one_kv_head": {"num_key_value_heads": 1, "rms_norm_eps": 1e-2},
}


def random_llama(directory: Path, seed: int = 0, **changes: Any) -> Any:
    """A model with weights large enough that attention is far from uniform, also saved."""
    transformers.logging.disable_progress_bar()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, scale = (1.0, 0.3) if "norm" in name else (0.0, 0.25)
            parameter.copy_(mean + scale * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return model


def forward(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, T, V]; the input of every layer and the final hidden states [L + 1, B, T, E]."""
    with torch.no_grad():
        out = model(torch.from_numpy(tokens.astype(np.int64)), output_hidden_states=True)
    return out.logits.numpy(), np.stack([hidden.numpy() for hidden in out.hidden_states])
