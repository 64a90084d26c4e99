"""What the config.json of well-known models says, and how many parameters they have.

Not a test. Written down from the published files: the keys that fix shape and arithmetic, as the
files spell them, old keys included. Counts are the published ones, tied embeddings counted once.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Published(NamedTuple):
    """A model of the hub."""

    config: dict[str, Any]
    parameters: int


def _llama(hidden: int, ffn: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "rms_norm_eps": 1e-05,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    return shape | rest


def _llama3(factor: float, **rest: Any) -> dict[str, Any]:
    scaling = {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    shape = {
        "attention_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_key_value_heads": 8,
        "rope_scaling": scaling,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    }
    return shape | rest


def _qwen(hidden: int, ffn: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    shape = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    return shape | rest


def _pythia(hidden: int, layers: int, heads: int, vocab: int = 50304) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": vocab,
    }


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": hidden,
        "n_head": heads,
        "n_layer": layers,
        "n_positions": 1024,
        "vocab_size": 50257,
    }


def _starcoder(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "activation_function": "gelu",
        "architectures": ["GPTBigCodeForCausalLM"],
        "attention_softmax_in_fp32": True,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt_bigcode",
        "multi_query": True,
        "n_embd": hidden,
        "n_head": heads,
        "n_inner": 4 * hidden,
        "n_layer": layers,
        "n_positions": 8192,
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
        "vocab_size": 49152,
    }


def _starcoder2(hidden: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        "attention_dropout": 0.1,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 16384,
        "mlp_type": "default",
        "norm_epsilon": 1e-05,
        "norm_type": "layer_norm",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "sliding_window": 4096,
        "use_bias": True,
        "vocab_size": 49152,
    }


def _gemma2(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": 8192,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    }


_GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
_OLMO2_1B = {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}
_PHI3_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
# The published factors are 48 numbers that say nothing here.
_PHI3_128K = _PHI3_MINI | {
    "max_position_embeddings": 131072,
    "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.1] * 48, "type": "longrope"},
    "sliding_window": 262144,
}
_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": True,
}
_SMOLLM2 = {
    "is_llama_config": True,
    "rope_interleaved": False,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}

HUB: dict[str, Published] = {
    "Llama-2-7b": Published(
        _llama(4096, 11008, 32, 32, max_position_embeddings=4096), 6_738_415_616
    ),
    "Llama-2-13b": Published(
        _llama(5120, 13824, 40, 40, max_position_embeddings=4096), 13_015_864_320
    ),
    "TinyLlama-1.1B": Published(_llama(2048, 5632, 22, 32, num_key_value_heads=4), 1_100_048_384),
    "Llama-3.1-8B": Published(_llama(4096, 14336, 32, 32, **_llama3(8.0)), 8_030_261_248),
    "Llama-3.2-1B": Published(
        _llama(2048, 8192, 16, 32, **_llama3(32.0, head_dim=64, tie_word_embeddings=True)),
        1_235_814_400,
    ),
    "Llama-3.2-3B": Published(
        _llama(3072, 8192, 28, 24, **_llama3(32.0, head_dim=128, tie_word_embeddings=True)),
        3_212_749_824,
    ),
    "SmolLM2-135M": Published(
        _llama(576, 1536, 30, 9, num_key_value_heads=3, **_SMOLLM2), 134_515_008
    ),
    "SmolLM2-360M": Published(
        _llama(960, 2560, 32, 15, num_key_value_heads=5, **_SMOLLM2), 361_821_120
    ),
    "SmolLM2-1.7B": Published(
        _llama(2048, 8192, 24, 32, num_key_value_heads=32, **_SMOLLM2 | {"rope_theta": 130000}),
        1_711_376_384,
    ),
    "Qwen1.5-1.8B": Published(_qwen(2048, 5504, 24, 16), 1_836_828_672),
    "Qwen1.5-4B": Published(_qwen(2560, 6912, 40, 20, rope_theta=5000000.0), 3_950_369_280),
    "Qwen1.5-7B": Published(_qwen(4096, 11008, 32, 32), 7_721_324_544),
    "Qwen1.5-14B": Published(_qwen(5120, 13696, 40, 40, vocab_size=152064), 14_167_290_880),
    "Qwen2.5-0.5B": Published(
        _qwen(896, 4864, 24, 14, num_key_value_heads=2, tie_word_embeddings=True), 494_032_768
    ),
    "Qwen2.5-1.5B": Published(
        _qwen(1536, 8960, 28, 12, num_key_value_heads=2, tie_word_embeddings=True), 1_543_714_304
    ),
    "Qwen2.5-7B": Published(
        _qwen(3584, 18944, 28, 28, num_key_value_heads=4, vocab_size=152064), 7_615_616_512
    ),
    "Qwen3-0.6B": Published(_qwen(1024, 3072, 28, 16) | _QWEN3, 596_049_920),
    "Mistral-7B-v0.1": Published(_MISTRAL, 7_241_732_096),
    "Phi-3-mini-4k": Published(_PHI3_MINI, 3_821_079_552),
    "Phi-3-mini-128k": Published(_PHI3_128K, 3_821_079_552),
    "OLMo-2-0425-1B": Published(_OLMO2_1B, 1_484_916_736),
    "gemma-2-2b": Published(_gemma2(2304, 9216, 26, 8, 4), 2_614_341_888),
    "gemma-2-9b": Published(_gemma2(3584, 14336, 42, 16, 8), 9_241_705_984),
    "gemma-3-1b": Published(_GEMMA3_1B, 999_885_952),
    "gpt2": Published(_gpt2(768, 12, 12), 124_439_808),
    "gpt2-medium": Published(_gpt2(1024, 24, 16), 354_823_168),
    "gpt2-large": Published(_gpt2(1280, 36, 20), 774_030_080),
    "gpt2-xl": Published(_gpt2(1600, 48, 25), 1_557_611_200),
    "starcoder": Published(_starcoder(6144, 40, 48), 15_517_456_384),
    "starcoderbase-1b": Published(_starcoder(2048, 24, 16), 1_137_207_296),
    "starcoder2-3b": Published(_starcoder2(3072, 30, 24, 2), 3_030_371_328),
    "starcoder2-7b": Published(_starcoder2(4608, 32, 36, 4), 7_173_923_840),
    "pythia-70m": Published(_pythia(512, 6, 8), 70_426_624),
    "pythia-160m": Published(_pythia(768, 12, 12), 162_322_944),
    "pythia-410m": Published(_pythia(1024, 24, 16), 405_334_016),
    "pythia-1b": Published(_pythia(2048, 16, 8), 1_011_781_632),
    "pythia-1.4b": Published(_pythia(2048, 24, 16), 1_414_647_808),
    "pythia-2.8b": Published(_pythia(2560, 32, 32), 2_775_208_960),
    "pythia-6.9b": Published(_pythia(4096, 32, 32, 50432), 6_857_302_016),
    "pythia-12b": Published(_pythia(5120, 36, 40, 50688), 11_846_072_320),
}
"""By name on the hub."""
