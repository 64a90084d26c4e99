"""Which layers see a window of tokens only: keys of config.json and the spec's pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddk_jax.errors import UserError
from ddk_jax.models.families.reading import flag, integer
from ddk_jax.models.families.table import Config, Fields
from ddk_jax.models.spec import ModelSpec

MOST_LAYERS = 1000
_KINDS = {"full_attention": "global", "sliding_attention": "local"}


def shortest_period(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that gives these kinds of layers when it is repeated."""
    size = next(
        n for n in range(1, len(kinds) + 1)
        if all(kind == kinds[i % n] for i, kind in enumerate(kinds))
    )  # fmt: skip
    return tuple(kinds[:size])


def kinds_of(spec: ModelSpec) -> list[str]:
    """The kind of every layer."""
    return [spec.pattern[i % len(spec.pattern)] for i in range(spec.num_layers)]


@dataclass(frozen=True)
class NoWindows:
    """All layers see all tokens before them."""

    def read(self, config: Config, fields: Fields) -> Fields:
        """Nothing; windows are refused."""
        if config.get("sliding_window") is not None:
            raise UserError(
                f"sliding_window = {config['sliding_window']!r} is not supported for this model, "
                "only null"
            )
        given = _given_kinds(config, fields)
        if given and "local" in given:
            raise UserError("layer_types: this model has no sliding_attention")
        return {}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class OneWindow:
    """All layers have a window, or none has."""

    default: int | None = None
    """Where the key is absent."""

    def read(self, config: Config, fields: Fields) -> Fields:
        """Pattern and window."""
        value = config.get("sliding_window", self.default)
        kind, window = "global", 0
        if value is not None:
            kind, window = "local", integer("sliding_window", value)
        given = _given_kinds(config, fields)
        if given and set(given) != {kind}:
            raise UserError(
                f"layer_types do not go with sliding_window = {value!r}: in this model all layers "
                "have a window, or none has"
            )
        return {"pattern": (kind,), "window": window}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """The key."""
        return {"sliding_window": spec.window if set(spec.pattern) == {"local"} else None}


@dataclass(frozen=True)
class UpperWindows:
    """Qwen: from some layer on, if windows are switched on; or as `layer_types` says."""

    def read(self, config: Config, fields: Fields) -> Fields:
        """Pattern and window."""
        window = None
        if flag("use_sliding_window", config.get("use_sliding_window", False)):
            window = config.get("sliding_window", 4096)
        kinds = _given_kinds(config, fields)
        if kinds is None:
            first = config.get("max_window_layers", 28)
            if not isinstance(first, int) or isinstance(first, bool) or first < 0:
                raise UserError(f"max_window_layers = {first!r}: expected a number of layers")
            count = fields["num_layers"]
            first = count if window is None else min(first, count)
            kinds = ["global"] * first + ["local"] * (count - first)
        return _pattern(kinds, "use_sliding_window and sliding_window", window)

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """The keys; old versions read `max_window_layers`, new ones `layer_types`."""
        kinds = kinds_of(spec)
        windows = "local" in kinds
        return {
            "use_sliding_window": windows,
            "sliding_window": spec.window if windows else None,
            "max_window_layers": kinds.index("local") if windows else len(kinds),
            "layer_types": _layer_types(kinds),
        }


@dataclass(frozen=True)
class EveryNth:
    """Gemma: the last of every few layers sees all tokens, or as `layer_types` says."""

    period: int
    """Where no key gives it."""
    key: str = ""
    """That of the period; empty: it has none."""

    def read(self, config: Config, fields: Fields) -> Fields:
        """Pattern and window."""
        kinds = _given_kinds(config, fields)
        if kinds is None:
            period = self.period
            if self.key:
                period = integer(self.key, config.get(self.key, period))
            kinds = ["local" if (i + 1) % period else "global" for i in range(fields["num_layers"])]
        return _pattern(kinds, "sliding_window", config.get("sliding_window", 4096))

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """The keys; old versions read the period, new ones `layer_types`."""
        kinds = kinds_of(spec)
        # transformers wants a window even where no layer uses it.
        written: dict[str, Any] = {
            "sliding_window": spec.window or spec.max_positions,
            "layer_types": _layer_types(kinds),
        }
        if self.key:
            first = kinds.index("global") if "global" in kinds else len(kinds)
            written[self.key] = first + 1
        return written


def _given_kinds(config: Config, fields: Fields) -> list[str] | None:
    """What `layer_types` says; None where it is absent."""
    if fields["num_layers"] > MOST_LAYERS:
        raise UserError(f"{fields['num_layers']} layers: expected at most {MOST_LAYERS}")
    given = config.get("layer_types")
    if given is None:
        return None
    known = isinstance(given, list) and all(
        isinstance(kind, str) and kind in _KINDS for kind in given
    )
    if not known or len(given) != fields["num_layers"]:
        raise UserError(
            f"layer_types = {given!r}: expected {fields['num_layers']} times one of "
            f"{', '.join(_KINDS)}"
        )
    return [_KINDS[kind] for kind in given]


def _pattern(kinds: Sequence[str], key: str, window: Any) -> Fields:
    if "local" not in kinds:
        return {"pattern": ("global",), "window": 0}
    if window is None:
        raise UserError(f"layer_types has sliding_attention, which needs {key}")
    return {"pattern": shortest_period(kinds), "window": integer("sliding_window", window)}


def _layer_types(kinds: Sequence[str]) -> list[str]:
    names = {ours: name for name, ours in _KINDS.items()}
    return [names[kind] for kind in kinds]
