"""Single keys of config.json: checked values, and the parts of a family that are one key each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddk_jax.errors import UserError
from ddk_jax.models.families.table import Config, Fields
from ddk_jax.models.spec import ModelSpec

MOST = 2**53
"""Integers beyond it are not sizes of anything, and not all of them are floats."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}
"""transformers' names of the nonlinearities that the decoder has, and ours. Of several names of one
function, the first is written."""

Default = Callable[[Fields], Any]


def integer(name: str, value: Any) -> int:
    """A positive integer.

    Raises:
      UserError: it is something else; the message names the key.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
        raise UserError(f"{name} = {value!r}: expected a positive integer")
    return value


def number(name: str, value: Any) -> float:
    """A positive finite number; `UserError` likewise."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not 0 < value <= 1e300:
        raise UserError(f"{name} = {value!r}: expected a positive number")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """True or false; `UserError` likewise."""
    if not isinstance(value, bool):
        raise UserError(f"{name} = {value!r}: expected true or false")
    return value


def activation(name: str, value: Any) -> str:
    """Our name of a nonlinearity; `UserError` for those that the decoder lacks."""
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UserError(f"{name} = {value!r} is not supported, only {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


@dataclass(frozen=True)
class Key:
    """A key that is one field of the spec. Its default tells its type."""

    name: str
    """In config.json."""
    field: str
    """Of the spec."""
    default: Any
    """Where the key is absent: the default of transformers' class, in config.json's terms; or a
    function of the fields before it, for integers."""
    null: Any = None
    """Likewise where the key is null. None: null is refused, as transformers does."""
    alias: str = ""
    """Another name that transformers takes for the same key."""
    also: tuple[str, ...] = ()
    """More fields that have the same value."""

    def read(self, config: Config, fields: Fields) -> Fields:
        """The field, and those beside it."""
        name = self.name
        if self.alias and self.alias in config:
            name = self.alias if name not in config else name
            if config[name] != config[self.alias]:
                raise UserError(
                    f"{name} = {config[name]!r}, {self.alias} = {config[self.alias]!r}: these must "
                    "be equal; correct or remove the wrong one"
                )
        if name in config and (config[name] is not None or self.null is None):
            value = self._parse(name, config[name])
        else:
            value = self.null if name in config else self.default
            # A null of 0 is the spec's own "none".
            value = value(fields) if callable(value) else value and self._parse(name, value)
        return dict.fromkeys((self.field, *self.also), value)

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """The key, by its first name."""
        value = getattr(spec, self.field)
        if self.field == "head_dim":
            value = spec.head_width
        if isinstance(self.default, str):
            same = [name for name, ours in ACTIVATIONS.items() if ours == value]
            value = self.default if self.default in same else same[0]
        none = value == self.null and not callable(self.null) and not isinstance(value, bool)
        return {self.name: None if none else value}

    def _parse(self, name: str, value: Any) -> Any:
        kinds = {bool: flag, float: number, str: activation}
        return kinds.get(type(self.default), integer)(name, value)


@dataclass(frozen=True)
class Echo:
    """A key that says again what another one does: where it is present, it must agree."""

    name: str
    field: str
    parse: Callable[[str, Any], Any]

    def read(self, config: Config, fields: Fields) -> Fields:
        """Nothing new."""
        value = config.get(self.name)
        if value is not None and self.parse(self.name, value) != fields[self.field]:
            raise UserError(
                f"{self.name} = {value!r} contradicts {self.field} = {fields[self.field]!r}, which "
                "follows from the other keys; correct or remove the wrong one"
            )
        return {}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class Only:
    """A key whose other values the decoder cannot compute; absent or null is this one."""

    name: str
    value: Any
    written: bool = False
    """Whether it is written."""

    def read(self, config: Config, fields: Fields) -> Fields:
        """Nothing; another value is refused."""
        found = config.get(self.name)
        alike = found == self.value and isinstance(found, bool) == isinstance(self.value, bool)
        if found is not None and not alike:
            wanted = json.dumps(self.value)
            raise UserError(f"{self.name} = {found!r} is not supported, only {wanted}")
        return {}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """The key."""
        return {self.name: self.value} if self.written else {}


@dataclass(frozen=True)
class QueryScale:
    """Gemma's `query_pre_attn_scalar`: scores are divided by its square root."""

    default: int

    def read(self, config: Config, fields: Fields) -> Fields:
        """The factor of the scores; 0 where it is that of the head's width."""
        name = "query_pre_attn_scalar"
        value = number(name, config.get(name, self.default))
        return {"attention_scale": 0.0 if value == fields["head_dim"] else value**-0.5}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """A whole number, as transformers wants."""
        scale = spec.attention_scale or spec.head_width**-0.5
        return {"query_pre_attn_scalar": round(scale**-2) if 1e-6 < scale < 1 else 1}


@dataclass(frozen=True)
class ScaleSwitch:
    """GPT-2's `scale_attn_weights`: whether scores are divided by the root of the head's width."""

    def read(self, config: Config, fields: Fields) -> Fields:
        """The factor of the scores."""
        name = "scale_attn_weights"
        return {"attention_scale": 0.0 if flag(name, config.get(name, True)) else 1.0}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """The switch."""
        return {"scale_attn_weights": not spec.attention_scale}


@dataclass(frozen=True)
class ManyHeads:
    """As many key/value heads as query heads, without a key that says so."""

    def read(self, config: Config, fields: Fields) -> Fields:
        """The number of key/value heads."""
        return {"num_kv_heads": fields["num_heads"]}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class MultiQuery:
    """gpt_bigcode's `multi_query`: one key/value head for all, or one for each query head."""

    def read(self, config: Config, fields: Fields) -> Fields:
        """The number of key/value heads."""
        one = flag("multi_query", config.get("multi_query", True))
        return {"num_kv_heads": 1 if one else fields["num_heads"]}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """The switch."""
        return {"multi_query": spec.num_kv_heads == 1}


def heads(fields: Fields) -> int:
    """As many key/value heads as query heads."""
    return fields["num_heads"]


def width(fields: Fields) -> int:
    """Heads that share the hidden size."""
    return max(1, fields["hidden_size"] // fields["num_heads"])


def four_times(fields: Fields) -> int:
    """GPT-2's inner width."""
    return 4 * fields["hidden_size"]


@dataclass(frozen=True)
class SharedWidth:
    """Heads that have no key for their width, because they always share the hidden size."""

    def read(self, config: Config, fields: Fields) -> Fields:
        """The width; a `head_dim` that says otherwise is refused."""
        hidden, count = fields["hidden_size"], fields["num_heads"]
        if hidden % count:
            raise UserError(f"hidden size {hidden} is not a multiple of {count} attention heads")
        found = config.get("head_dim")
        if found is not None and integer("head_dim", found) != hidden // count:
            raise UserError(
                f"head_dim = {found}: the heads of this model share its hidden size, which gives "
                f"{hidden // count}; correct or remove it"
            )
        return {"head_dim": hidden // count}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """Nothing."""
        return {}


EVERYWHERE = (
    Only("quantization_config", None),
    Only("per_layer_config", None),
    Only("is_encoder_decoder", False),
    Only("add_cross_attention", False),
    Only("use_bidirectional_attention", False),
    Only("is_causal", True),
)
"""Settings that transformers knows for every family, and the decoder for none."""
