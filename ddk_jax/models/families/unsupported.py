"""What to say of architectures that are not supported: the nearest one, and what differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EXPERTS = "mixture of experts is not supported"
_ALIBI = "attention biased by distance (ALiBi) is not supported"
_IMAGES = "a model of images and text is not supported"
_ENCODER = "an encoder with a decoder is not supported"
_RECURRENT = "recurrent (linear attention or state-space) layers are not supported"

_OTHER_HEADS = (
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)

# By architecture: the nearest supported family, and what differs.
_DIFFERENCES = {
    "MixtralForCausalLM": ("mistral", _EXPERTS),
    "MinistralForCausalLM": ("mistral", "layer_types in a Mistral are not supported"),
    "Mistral3ForConditionalGeneration": ("mistral", _IMAGES),
    "Qwen2MoeForCausalLM": ("qwen2", _EXPERTS),
    "Qwen3MoeForCausalLM": ("qwen3", _EXPERTS),
    "Qwen3NextForCausalLM": ("qwen3", _RECURRENT),
    "Qwen2VLForConditionalGeneration": ("qwen2", _IMAGES),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2", _IMAGES),
    "QWenLMHeadModel": ("qwen2", "it needs Python code of its own; Qwen1.5 and later do not"),
    "Llama4ForCausalLM": ("llama", _EXPERTS),
    "Llama4ForConditionalGeneration": ("llama", _EXPERTS),
    "MllamaForConditionalGeneration": ("llama", _IMAGES),
    "GraniteForCausalLM": (
        "llama",
        "its multipliers of embeddings and residuals are not supported",
    ),
    "SmolLM3ForCausalLM": ("llama", "layers without positions are not supported"),
    "StableLmForCausalLM": ("llama", "layer norms in a gated model are not supported"),
    "CohereForCausalLM": ("llama", "scaled logits and layer norms without bias are not supported"),
    "DeepseekV2ForCausalLM": ("llama", "latent attention and mixture of experts are not supported"),
    "DeepseekV3ForCausalLM": ("llama", "latent attention and mixture of experts are not supported"),
    "GptOssForCausalLM": ("llama", _EXPERTS),
    "GemmaForCausalLM": (
        "gemma2",
        "Gemma 1, which lacks its norms behind attention and MLP, is not",
    ),
    "Gemma3nForConditionalGeneration": ("gemma3_text", _IMAGES),
    "Gemma3ForConditionalGeneration": (
        "gemma3_text",
        f"{_IMAGES}; save its language model by itself, as Gemma3ForCausalLM with model_type "
        "gemma3_text",
    ),
    "OlmoForCausalLM": ("olmo2", "layer norms without parameters are not supported"),
    "Olmo3ForCausalLM": ("olmo2", "windows in OLMo are not supported"),
    "OlmoeForCausalLM": ("olmo2", _EXPERTS),
    "PhiForCausalLM": ("gpt_neox", "one norm for both attention and MLP is not supported"),
    "PhimoeForCausalLM": ("phi3", _EXPERTS),
    "Phi4MultimodalForCausalLM": ("phi3", _IMAGES),
    "GPTJForCausalLM": ("gpt_neox", "one norm for both attention and MLP is not supported"),
    "FalconForCausalLM": ("gpt_neox", "one norm for both attention and MLP is not supported"),
    "GPTNeoForCausalLM": ("gpt2", "unscaled attention with local layers is not supported"),
    "OPTForCausalLM": ("gpt2", "positions that start at 2 are not supported"),
    "BloomForCausalLM": ("gpt2", _ALIBI),
    "MptForCausalLM": ("gpt2", _ALIBI),
    "MambaForCausalLM": ("llama", _RECURRENT),
    "T5ForConditionalGeneration": ("llama", _ENCODER),
    "BartForConditionalGeneration": ("gpt2", _ENCODER),
}


def difference(architectures: Any, supported: Mapping[str, str]) -> str:
    """Why a config of no supported family is not supported.

    Args:
      architectures: of the config.
      supported: the architecture of every family.
    """
    names = architectures if isinstance(architectures, list) else []
    for name in (name for name in names if isinstance(name, str)):
        if name in _DIFFERENCES:
            nearest, what = _DIFFERENCES[name]
            return f"{what}; the nearest supported is {supported[nearest]}"
        if "Moe" in name:
            return _EXPERTS
        for architecture in supported.values():
            if name == architecture:
                return f"a {name} has another model_type; correct the wrong one"
            base = architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
            if name in {f"{base}{end}" for end in _OTHER_HEADS}:
                return f"not a causal language model; {architecture} is supported"
    return f"not supported; supported are {', '.join(supported.values())}"
