"""Rotary positions in config.json, as new and as old files write them.

New files have `rope_parameters` {rope_type, rope_theta, ...}; old ones `rope_theta` and, where
positions are stretched, `rope_scaling` {type or rope_type, factor, ...}. Both are read, and what is
said twice must agree; both are written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ddk_jax.errors import UserError
from ddk_jax.models.families.reading import flag, integer, number
from ddk_jax.models.families.table import Config, Fields
from ddk_jax.models.spec import ModelSpec, RopeScaling

LENGTH = "original_max_position_embeddings"
FULL, SLIDING = "full_attention", "sliding_attention"  # names of Gemma 3's objects
KINDS = {kind: kind for kind in ("linear", "llama3", "yarn", "longrope")}
"""Ways of stretching, by their names in a file."""
USED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "original_positions", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", "original_positions", "beta_fast", "beta_slow", "truncate", "attention_factor",
    ),
    "longrope": ("short_factor", "long_factor", "original_positions", "attention_factor"),
}  # fmt: skip
"""Fields of `RopeScaling` that a kind uses. In a file they have the same names, except LENGTH."""

_KNOWN = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", LENGTH, "mscale", "mscale_all_dim",
    *(name for names in USED.values() for name in names if name != "original_positions"),
}  # fmt: skip

Said = list[tuple[str, Any]]
"""What keys say: their names and values."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions that are the same in all layers."""

    theta_key: str = "rope_theta"
    fraction_key: str = ""
    """Of the share of a head that is rotated. Empty: this family rotates whole heads."""
    fraction: float = 1.0
    """Where no key gives it."""
    kinds: Mapping[str, str] = field(default_factory=lambda: KINDS)
    """Ways of stretching that transformers has for the family."""
    length: int = 0
    """The original length where there is no such key outside of the objects, which then counts
    more than theirs (Phi-3). 0: `max_position_embeddings`."""

    def read(self, config: Config, fields: Fields) -> Fields:
        """Base, share and stretching."""
        objects = _objects(config)
        for key, rope in objects.items():
            if any(isinstance(value, Mapping) for value in rope.values()):
                raise UserError(
                    f"{key} = {rope!r}: different rotary positions by layer are supported for "
                    "gemma3_text only"
                )
        theta = _agreed(_numbers(config, objects, self.theta_key, "rope_theta"), default=10_000.0)
        fraction_key = self.fraction_key or "partial_rotary_factor"
        said = _numbers(config, objects, fraction_key, "partial_rotary_factor")
        fraction = _agreed(said, default=self.fraction)
        if not self.fraction_key and fraction != 1:
            raise UserError(f"partial_rotary_factor = {fraction:g} is not supported, only 1.0")
        fields = fields | {"rope_theta": theta, "rope_fraction": fraction}
        scaling = _agreed_scaling(objects, config, fields, self.kinds, self.length)
        return {"rope_theta": theta, "rope_fraction": fraction, "rope_scaling": scaling}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """The keys of new and of old files."""
        keys = _plain(spec.rope_theta) | _numbers_of(spec.rope_scaling)
        old = _old_object(spec.rope_scaling, phi3=bool(self.length))
        written = {"rope_parameters": keys, self.theta_key: spec.rope_theta, "rope_scaling": old}
        if self.fraction_key:
            keys["partial_rotary_factor"] = written[self.fraction_key] = spec.rope_fraction
        if self.length or _is_longrope(spec.rope_scaling):
            scaled = spec.rope_scaling
            written[LENGTH] = scaled.original_positions if scaled else spec.max_positions
        return written


@dataclass(frozen=True)
class LayerRope:
    """Gemma 3: local layers have a base of their own and are never stretched."""

    def read(self, config: Config, fields: Fields) -> Fields:
        """Bases of both kinds of layers, and the stretching of the global ones."""
        objects = _objects(config)
        new = objects.pop("rope_parameters", {})
        if not new.keys() <= {FULL, SLIDING}:
            raise UserError(
                f"rope_parameters = {new!r}: Gemma 3 has one object for {FULL} and one for "
                f"{SLIDING}"
            )
        inner = {f"rope_parameters.{kind}": rope for kind, rope in new.items() if rope is not None}
        for key, rope in inner.items():
            if not isinstance(rope, Mapping):
                raise UserError(f"{key} = {rope!r}: expected an object")
        sliding = {key: rope for key, rope in inner.items() if key.endswith(SLIDING)}
        full = {key: rope for key, rope in inner.items() if key.endswith(FULL)} | objects
        theta = _agreed(_numbers(config, full, "rope_theta", "rope_theta"), default=1e6)
        local = _agreed(
            _numbers(config, sliding, "rope_local_base_freq", "rope_theta"), default=10_000.0
        )
        for said in (full, sliding):
            shares = _numbers({}, said, "", "partial_rotary_factor")
            if (share := _agreed(shares, default=1.0)) != 1:
                raise UserError(f"partial_rotary_factor = {share:g} is not supported, only 1.0")
        fields = fields | {"rope_fraction": 1.0}
        scaling = _agreed_scaling(full, config, fields, KINDS, 0)
        if scaling and not scaling.truncate:
            raise UserError("rope_parameters: truncate = False has no effect in Gemma 3; remove it")
        if _agreed_scaling(sliding, config, fields, KINDS, 0):
            raise UserError(f"rope_parameters.{SLIDING}: only rope_type 'default' is supported")
        alike = (local == theta and not scaling) or "local" not in fields["pattern"]
        return {
            "rope_theta": theta,
            "rope_scaling": scaling,
            "local_rope_theta": 0.0 if alike else local,
        }

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """The keys of new and of old files."""
        if "local" in spec.pattern and spec.rope_scaling and not spec.local_rope_theta:
            raise UserError(
                "local_rope_theta = 0 with rope_scaling: the local layers of Gemma 3 are not "
                "stretched; give them a base"
            )
        local = spec.local_rope_theta or spec.rope_theta
        full = _plain(spec.rope_theta) | _numbers_of(spec.rope_scaling)
        written = {
            "rope_parameters": {FULL: full, SLIDING: _plain(local)},
            "rope_theta": spec.rope_theta,
            "rope_local_base_freq": local,
            "rope_scaling": _old_object(spec.rope_scaling, phi3=False),
        }
        if spec.rope_scaling and _is_longrope(spec.rope_scaling):
            written[LENGTH] = spec.rope_scaling.original_positions
        return written


def essential(scaling: RopeScaling | None) -> RopeScaling | None:
    """The same stretching, without numbers that its kind does not use."""
    if scaling is None:
        return None
    used = {name: getattr(scaling, name) for name in USED[scaling.kind]}
    return RopeScaling(kind=scaling.kind, **used)


def _objects(config: Config) -> dict[str, Mapping[str, Any]]:
    """Those of `rope_parameters` and `rope_scaling` that are there and not empty."""
    found = {}
    for key in ("rope_parameters", "rope_scaling"):
        if rope := config.get(key):
            if not isinstance(rope, Mapping):
                raise UserError(f"{key} = {rope!r}: expected an object")
            found[key] = rope
    return found


def _numbers(
    config: Config, objects: Mapping[str, Mapping[str, Any]], outer: str, inner: str
) -> Said:
    """What a key of the config and one of the objects say; null says nothing."""
    said = [(outer, config.get(outer))]
    said += [(f"{key}.{inner}", rope.get(inner)) for key, rope in objects.items()]
    return [(key, number(key, value)) for key, value in said if value is not None]


def _agreed(said: Said, default: Any) -> Any:
    """The one value of several keys."""
    if any(value != said[0][1] for _, value in said):
        listed = ", ".join(f"{key} = {value:.12g}" for key, value in said)
        raise UserError(f"{listed}: these must be equal; correct or remove the wrong one")
    return said[0][1] if said else default


def _agreed_scaling(
    objects: Mapping[str, Mapping[str, Any]],
    config: Config,
    fields: Fields,
    kinds: Mapping[str, str],
    length: int,
) -> RopeScaling | None:
    """The stretching that all objects describe."""
    found = [_scaling(key, rope, config, fields, kinds, length) for key, rope in objects.items()]
    if any(scaling != found[0] for scaling in found):
        listed = ", ".join(f"{key} = {rope!r}" for key, rope in objects.items())
        raise UserError(f"{listed}: these must say the same; correct or remove the wrong one")
    return found[0] if found else None


def _scaling(
    key: str,
    rope: Mapping[str, Any],
    config: Config,
    fields: Fields,
    kinds: Mapping[str, str],
    length: int,
) -> RopeScaling | None:
    """The stretching of one object."""
    if unknown := [name for name in rope if name not in _KNOWN and rope[name] is not None]:
        raise UserError(f"{key} = {rope!r}: {unknown[0]!r} is not supported")
    names = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{key} = {rope!r}: expected the name of a rope_type")
    said_kinds = {kinds.get(name, name) for name in names} or {"default"}
    kind = said_kinds.pop()
    if said_kinds or kind not in ("default", *kinds.values()):
        raise UserError(
            f"{key} = {rope!r}: rope_type {' and '.join(names)} is not supported, only default, "
            f"{', '.join(kinds)}"
        )
    if kind == "default":
        return None
    read = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}[kind]
    original = 0
    if kind != "linear":
        outer, inner = config.get(LENGTH), rope.get(LENGTH)
        outer = length or None if outer is None else outer
        if outer is not None and inner == fields["max_positions"]:
            inner = None  # transformers fills it in like this, and then uses the outer one
        said = [(LENGTH, outer), (f"{key}.{LENGTH}", inner)]
        lengths = [(name, integer(name, value)) for name, value in said if value is not None]
        original = _agreed(lengths, default=fields["max_positions"])
    return RopeScaling(**read(key, rope, fields, original))


def _factor(key: str, rope: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = rope.get(name)
    return number(f"{key}.{name}", default if value is None else value)


def _linear(key: str, rope: Mapping[str, Any], fields: Fields, original: int) -> Fields:
    return {"kind": "linear", "factor": _factor(key, rope, "factor")}


def _llama3(key: str, rope: Mapping[str, Any], fields: Fields, original: int) -> Fields:
    low, high = (_factor(key, rope, f"{end}_freq_factor") for end in ("low", "high"))
    if high <= low:
        raise UserError(f"{key} = {rope!r}: high_freq_factor must be larger than low_freq_factor")
    return {
        "kind": "llama3",
        "factor": _factor(key, rope, "factor"),
        "original_positions": original,
        "low_freq_factor": low,
        "high_freq_factor": high,
    }


def _yarn(key: str, rope: Mapping[str, Any], fields: Fields, original: int) -> Fields:
    if "factor" not in rope:
        raise UserError(f"{key} = {rope!r}: factor is missing")
    # It may be null, though.
    factor = _factor(key, rope, "factor", fields["max_positions"] / original)
    attention = 0.0
    if rope.get("attention_factor") is not None:
        attention = _factor(key, rope, "attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        one, other = (_factor(key, rope, name) for name in ("mscale", "mscale_all_dim"))
        grown = 0.1 * math.log(factor) if factor > 1 else 0.0
        attention = (one * grown + 1) / (other * grown + 1)
    truncate = rope.get("truncate")
    return {
        "kind": "yarn",
        "factor": factor,
        "original_positions": original,
        "beta_fast": _factor(key, rope, "beta_fast", 32.0),
        "beta_slow": _factor(key, rope, "beta_slow", 1.0),
        "truncate": True if truncate is None else flag(f"{key}.truncate", truncate),
        "attention_factor": attention,
    }


def _longrope(key: str, rope: Mapping[str, Any], fields: Fields, original: int) -> Fields:
    pairs = int(fields["head_dim"] * fields["rope_fraction"]) // 2
    divisors = {}
    for name in ("short_factor", "long_factor"):
        values = rope.get(name)
        if not isinstance(values, list | tuple) or len(values) != pairs:
            raise UserError(f"{key}.{name} = {values!r}: expected a list of {pairs} numbers")
        divisors[name] = tuple(number(f"{key}.{name}", value) for value in values)
    if original < 2:
        raise UserError(f"{key}: {LENGTH} = {original} is too short for longrope")
    attention, ratio = 0.0, fields["max_positions"] / original
    if rope.get("attention_factor") is not None:
        attention = _factor(key, rope, "attention_factor")
    elif (factor := _factor(key, rope, "factor", ratio)) != ratio:
        attention = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))
    return {
        "kind": "longrope",
        "original_positions": original,
        "attention_factor": attention,
        **divisors,
    }


def _plain(theta: float) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": "default"}


def _is_longrope(scaling: RopeScaling | None) -> bool:
    return scaling is not None and scaling.kind == "longrope"


def _numbers_of(scaling: RopeScaling | None) -> dict[str, Any]:
    """Type and numbers of a stretching, as new files write them."""
    if scaling is None:
        return {}
    keys: dict[str, Any] = {"rope_type": scaling.kind}
    for name in USED[scaling.kind]:
        value = getattr(scaling, name)
        if (name, value) not in (("truncate", True), ("attention_factor", 0.0)):
            named = LENGTH if name == "original_positions" else name
            keys[named] = list(value) if isinstance(value, tuple) else value
    return keys


def _old_object(scaling: RopeScaling | None, *, phi3: bool) -> dict[str, Any] | None:
    """`rope_scaling`, in the form that old versions check most strictly."""
    if scaling is None:
        return None
    keys = _numbers_of(scaling)
    if scaling.kind == "linear" or phi3:
        keys["type"] = keys.pop("rope_type")  # the only name that they knew
    if phi3:
        keys.pop(LENGTH, None)  # which stands outside
    return keys
