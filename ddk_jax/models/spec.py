"""The shape of a decoder, as frozen data: what `decoder.py` builds and `families.py` translates."""

from __future__ import annotations

from dataclasses import dataclass

LAYER_KINDS = ("global",)


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
    """Inner width of the gated MLP."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-5
    """Epsilon inside the RMS norm."""
    tied_head: bool = True
    """Whether the LM head is the transposed embedding table."""
    max_positions: int = 2048
    """Longest sequence that the model is meant for; written to the exported config."""
    pattern: tuple[str, ...] = ("global",)
    """Kinds of the layers, repeated over the depth: the scan runs over whole periods, the rest is
    unrolled. A Llama has period 1."""

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

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, embeddings included, tied ones counted once."""
        attention = self.hidden_size * self.head_width * 2 * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size
        embeddings = (1 if self.tied_head else 2) * self.vocab_size * self.hidden_size
        return embeddings + self.num_layers * layer + self.hidden_size
