"""The architecture that llama.cpp calls `llama`: Llama, Mistral, SmolLM2 and their like.

Metadata become a `ModelSpec`, and tensors get the names and the layout that Hugging Face has.
llama.cpp rotates neighbouring dimensions of a head, Hugging Face and we those half a head apart, so
its converter has interleaved the rows of q and k; here that is undone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ddk_jax.errors import UserError
from ddk_jax.models import families
from ddk_jax.models.directory import some
from ddk_jax.models.gguf.file import TOKENS, GGUFFile, Tensor, can_dequantise
from ddk_jax.models.spec import ModelSpec, RopeScaling

ARCHITECTURE = "llama"
_ROPE_FACTORS = "rope_freqs.weight"

# Keys that are read below, and those that do not change what the model computes.
_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
    "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout",
}  # fmt: skip
# Keys that do, unless they have this value.
_FIXED = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}


class _Rule(NamedTuple):
    """Where a parameter of ours lies in the file."""

    name: str
    """Of the tensor; in a layer, behind `blk.<layer>.`."""
    interleaved: bool = False
    """Whether llama.cpp's converter has permuted the rows of each head."""


_RULES: dict[tuple[str, ...], _Rule] = {
    ("embed", "table"): _Rule("token_embd"),
    ("head", "kernel"): _Rule("output"),
    ("norm", "scale"): _Rule("output_norm"),
    ("attn_norm", "scale"): _Rule("attn_norm"),
    ("attn", "q"): _Rule("attn_q", interleaved=True),
    ("attn", "k"): _Rule("attn_k", interleaved=True),
    ("attn", "v"): _Rule("attn_v"),
    ("attn", "o"): _Rule("attn_output"),
    ("mlp_norm", "scale"): _Rule("ffn_norm"),
    ("mlp", "gate"): _Rule("ffn_gate"),
    ("mlp", "up"): _Rule("ffn_up"),
    ("mlp", "down"): _Rule("ffn_down"),
}
"""By the path in the parameter tree, within a layer where it is of one."""


def read_spec(file: GGUFFile) -> ModelSpec:
    """The decoder that a file's metadata describe.

    Raises:
      UserError: another architecture, a feature that is not supported, or a value that is missing
        or out of range.
    """
    try:
        return _spec(file)
    except ValueError as error:  # also from ModelSpec
        raise UserError(f"{file.path}: {error}") from error


def hf_tensors(file: GGUFFile, spec: ModelSpec) -> dict[str, Any]:
    """The tensors under their Hugging Face names, in Hugging Face's layout; nothing is read yet.

    What has no such name keeps its own, so that it is noticed.
    """
    found: dict[str, Any] = {}
    left = file.tensors.keys() - {_ROPE_FACTORS}
    for place in families.placements(spec):
        rule = _RULES[place.path if place.period is None else place.path[2:]]
        layer = "" if place.period is None else f"blk.{place.period}."
        name = f"{layer}{rule.name}.weight"
        if name not in file.tensors:
            continue
        left.discard(name)
        found[place.name] = file.tensors[name]
        if rule.interleaved:
            found[place.name] = Deinterleaved(file.tensors[name], spec.head_width)
    return found | {name: file.tensors[name] for name in left}


@dataclass(frozen=True)
class Deinterleaved:
    """The matrix of q or k with its rows as Hugging Face has them."""

    tensor: Tensor
    """As the file has it."""
    head_width: int
    """Rows of a head."""

    def get_shape(self) -> list[int]:
        """The shape, as safetensors gives it."""
        return self.tensor.get_shape()

    def get_dtype(self) -> str:
        """The type of what is read."""
        return self.tensor.get_dtype()

    def __getitem__(self, index: tuple[slice, slice]) -> Float[np.ndarray, "rows columns"]:
        """The values at a slice of the rows and one of the columns."""
        rows, columns = index
        start, stop, _ = rows.indices(self.tensor.shape[0])
        # Whole heads, since their rows are mixed.
        width = self.head_width
        first, last = start // width * width, -(-stop // width) * width
        values = deinterleave(self.tensor[first:last, columns], width)
        return values[start - first : stop - first]


def deinterleave(
    rows: Float[np.ndarray, "rows columns"], head_width: int
) -> Float[np.ndarray, "rows columns"]:
    """Undo llama.cpp's permutation of the rows of q or k.

    Within each head it has put row i and row i + head_width/2 beside each other.
    """
    heads, half, columns = len(rows) // head_width, head_width // 2, rows.shape[1]
    return rows.reshape(heads, half, 2, columns).swapaxes(1, 2).reshape(rows.shape)


def _spec(file: GGUFFile) -> ModelSpec:
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(
            f"architecture {architecture!r} is not supported, only {ARCHITECTURE!r} (Llama, "
            "Mistral, SmolLM2, ...); get the model's safetensors instead"
        )
    if str(metadata.get("split.count", 1)) not in "01":
        raise UserError("one of several parts; join them with llama-gguf-split --merge")
    _refuse_unknown(metadata)
    hidden, heads = (
        _integer(metadata, "embedding_length"),
        _integer(metadata, "attention.head_count"),
    )
    head_dim = _integer(metadata, "attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _integer(metadata, key, head_dim) != head_dim:
            raise UserError(f"{_full(key)} differs from the heads' width, {head_dim}")
    layers = _integer(metadata, "block_count")
    if layers > len(file.tensors):
        raise UserError(f"{_full('block_count')} = {layers}: more than the file has tensors")
    tokens = metadata.get(TOKENS)
    vocab_size = len(tokens) if isinstance(tokens, list) else _integer(metadata, "vocab_size")
    theta = _number(metadata, "rope.freq_base", 10_000.0)
    return ModelSpec(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_integer(metadata, "attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_size=_integer(metadata, "feed_forward_length"),
        max_positions=_integer(metadata, "context_length"),
        tied_head="output.weight" not in file.tensors,
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, theta, head_dim),
        norm_eps=_number(metadata, "attention.layer_norm_rms_epsilon"),
    )


def _rope_scaling(file: GGUFFile, theta: float, head_dim: int) -> RopeScaling | None:
    metadata = file.metadata
    kind = str(metadata.get(_full("rope.scaling.type"), "linear"))
    if kind not in ("none", "linear"):
        raise UserError(
            f"{_full('rope.scaling.type')} = {kind!r} is not supported, only 'none' and 'linear'"
        )
    old_name = _full("rope.scaling.factor") not in metadata
    factor = _number(metadata, "rope.scale_linear" if old_name else "rope.scaling.factor", 1.0)
    found = None
    if kind == "linear" and factor != 1.0:
        found = RopeScaling(kind="linear", factor=factor)
    if _ROPE_FACTORS in file.tensors:
        tensor = file.tensors[_ROPE_FACTORS]
        if found or tensor.shape != (head_dim // 2,) or not can_dequantise(tensor.kind):
            raise UserError(
                f"{_ROPE_FACTORS} is {tensor.kind} {list(tensor.shape)} for {[head_dim // 2]}, or "
                f"stands beside {_full('rope.scaling.factor')}"
            )
        found = _llama3(metadata, tensor[()], theta)
    return found


def _llama3(
    metadata: Mapping[str, Any], divisors: Float[np.ndarray, "half"], theta: float
) -> RopeScaling | None:
    """The scaling of Llama 3.1 and later, which files hold as a divisor of each frequency."""
    if np.all(divisors == 1):
        return None
    length = _integer(metadata, "rope.scaling.original_context_length", 8192)
    scaling = RopeScaling(
        kind="llama3",
        factor=_short(float(divisors.max())),
        original_positions=length,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    turns = length * theta ** -(np.arange(len(divisors)) / len(divisors)) / (2 * np.pi)
    kept = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - kept) / scaling.factor + kept), rtol=1e-4):
        raise UserError(
            f"{_ROPE_FACTORS} is not that of Llama 3 (original length {length}, low and high "
            "frequency factor 1 and 4), and no other scaling by divisors is supported"
        )
    return scaling


def _refuse_unknown(metadata: Mapping[str, Any]) -> None:
    """Refuse keys of the architecture that may change the arithmetic in a way not known here."""
    unknown = []
    for key, value in metadata.items():
        prefix, _, name = key.partition(".")
        # As text, since a value may be an array, which has no single truth.
        neutral = name in _READ or (name in _FIXED and str(value) == str(_FIXED[name]))
        if prefix == ARCHITECTURE and not neutral:
            unknown.append(f"{key} = {value!r:.60}")
    if unknown:
        raise UserError(
            f"not supported, for it may change what the model computes: {some(unknown)}"
        )


def _full(key: str) -> str:
    return f"{ARCHITECTURE}.{key}"


def _integer(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = metadata.get(_full(key), default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise UserError(f"{_full(key)} = {value!r}: expected one positive integer")
    return value


def _number(metadata: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number."""
    value = metadata.get(_full(key), default)
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not math.isfinite(value) or value <= 0:
        raise UserError(f"{_full(key)} = {value!r}: expected a positive number")
    return _short(value)


def _short(value: float) -> float:
    """The shortest decimal number that is the same float32, which is what the file holds."""
    return float(str(np.float32(value)))
