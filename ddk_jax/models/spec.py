"""The shape of a decoder, as frozen data: what `decoder.py` builds and `families` translates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LAYER_KINDS = ("global", "local")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary positions are stretched beyond the length that a model was first trained on.

    The names of the kinds and of their numbers are those of transformers' `rope_parameters`.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    """linear: positions are divided by `factor`. llama3: low frequencies are. yarn: likewise with a
    ramp (arXiv 2309.00071). longrope: every frequency has its own divisor (arXiv 2402.13753)."""
    factor: float = 1.0
    """Ratio of the new length to the old one."""
    original_positions: int = 0
    """Length that the model was first trained on; unused by `linear`."""
    low_freq_factor: float = 1.0
    """Of llama3: wavelengths beyond `original_positions / low_freq_factor` are stretched."""
    high_freq_factor: float = 4.0
    """Of llama3: wavelengths under `original_positions / high_freq_factor` stay."""
    beta_fast: float = 32.0
    """Of yarn: frequencies with more turns than this in the original length stay."""
    beta_slow: float = 1.0
    """Of yarn: frequencies with fewer turns than this are stretched."""
    truncate: bool = True
    """Of yarn: whether the ends of the ramp are rounded to whole dimensions."""
    attention_factor: float = 0.0
    """Of yarn and longrope: cosine and sine are multiplied by it. 0: by the paper's function of
    `factor` (yarn), or of the ratio of the lengths (longrope)."""
    short_factor: tuple[float, ...] = ()
    """Of longrope: divisor of each frequency in sequences up to the original length."""
    long_factor: tuple[float, ...] = ()
    """Of longrope: divisor of each frequency in longer sequences."""

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: must be positive")
        if self.kind != "linear" and self.original_positions < 1:
            raise ValueError(f"{self.kind} needs original_positions of at least 1")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("high_freq_factor must be larger than low_freq_factor")
        factors = self.short_factor, self.long_factor
        if self.kind == "longrope" and not (min(map(len, factors)) and min(map(min, factors)) > 0):
            raise ValueError("longrope needs positive short_factor and long_factor")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything that fixes a decoder's parameters and arithmetic, except its values."""

    family: str = "llama"
    """Name of the table in `models.families` that maps Hugging Face names and config keys."""
    vocab_size: int = 0
    """Rows of the embedding table. 0 in a config means: as many as the tokenizer has tokens."""
    hidden_size: int = 0
    """Width of the residual stream."""
    num_layers: int = 0
    """Number of decoder layers."""
    num_heads: int = 0
    """Number of query heads."""
    num_kv_heads: int = 0
    """Number of key/value heads (grouped-query attention); must divide `num_heads`."""
    head_dim: int = 0
    """Width of one head. 0 means `hidden_size / num_heads`."""
    ffn_size: int = 0
    """Inner width of the MLP."""
    max_positions: int = 2048
    """Longest sequence that the model is meant for; rows of the table of learned positions."""
    tied_head: bool = True
    """Whether the LM head is the transposed embedding table."""
    scaled_embedding: bool = False
    """Whether embeddings are multiplied by sqrt(hidden_size), rounded to the activations' type."""

    positions: Literal["rope", "learned"] = "rope"
    """How a token knows its position: rotated queries and keys, or a table that is added."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding."""
    rope_fraction: float = 1.0
    """Share of a head's dimensions, the first ones, that is rotated."""
    rope_scaling: RopeScaling | None = None
    """How the rotation is stretched; None: it is not."""
    local_rope_theta: float = 0.0
    """Base of the plain rotation in `local` layers. 0: they rotate as the others do."""

    pattern: tuple[str, ...] = ("global",)
    """Kinds of the layers, repeated over the depth: the scan runs over whole periods, the rest is
    unrolled. A Llama has period 1."""
    window: int = 0
    """Tokens that a query of a `local` layer sees, itself among them."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have biases."""
    out_bias: bool = False
    """Whether the projection behind the attention has a bias."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """RMS norm of queries and keys before the rotation: of every head, or of all heads at once."""
    attention_scale: float = 0.0
    """Factor of the scores. 0 means `head_dim ** -0.5`."""
    attention_softcap: float = 0.0
    """Scores are squeezed into (-softcap, softcap) by a tanh. 0: they are not."""

    gated_mlp: bool = True
    """down(activation(gate(x)) * up(x)); otherwise down(activation(up(x)))."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    """Nonlinearity of the MLP; `gelu` is the exact one, `gelu_tanh` its usual approximation."""
    mlp_bias: bool = False
    """Whether the matrices of the MLP have biases."""

    norm: Literal["rms", "layer"] = "rms"
    """Root-mean-square norm with a scale, or layer norm with a scale and a bias."""
    norm_eps: float = 1e-5
    """Epsilon inside the norms."""
    norm_plus_one: bool = False
    """Whether norms multiply by 1 + scale (Gemma)."""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """Whether attention and MLP have a norm on their input, their output (OLMo 2), or on both."""
    parallel_residual: bool = False
    """Whether attention and MLP read the same residual stream, each through its own norm."""
    logit_softcap: float = 0.0
    """Logits are squeezed into (-softcap, softcap) by a tanh. 0: they are not."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if self.num_heads and self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = "
                f"{self.num_kv_heads}: every key/value head serves the same number of query heads"
            )
        if not self.head_dim and self.num_heads and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not a multiple of num_heads = "
                f"{self.num_heads}: set head_dim"
            )
        if not self.pattern or any(kind not in LAYER_KINDS for kind in self.pattern):
            raise ValueError(f"pattern = {self.pattern}: needs layer kinds out of {LAYER_KINDS}")
        if "local" in self.pattern and self.window < 1:
            raise ValueError(f"window = {self.window}: `local` layers need one of at least 1 token")
        if self.positions == "rope" and self.num_heads and self.hidden_size:
            width = self.rotary_width
            if not 0 < width <= self.head_width or width % 2:
                raise ValueError(
                    f"rope_fraction = {self.rope_fraction} of a head of {self.head_width} is "
                    f"{width} dimensions: needs an even number of them, at least 2"
                )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_width * self.rope_fraction)
