"""Model families: what Hugging Face calls, and how it lays out, the parts of our decoder.

Data and small functions only; `hf.py` reads and writes files with them. A family is a list of
parts, each some keys of config.json and the fields of `ModelSpec` that say the same, and a function
from a spec to its tensors (`table.py`). To add one, write it beside its nearest relative and list
it in `FAMILIES`; docs/models.md says how.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from ddk_jax.errors import UserError
from ddk_jax.models.families.gemma import GEMMA2, GEMMA3
from ddk_jax.models.families.gpt import BIGCODE, GPT2, NEOX
from ddk_jax.models.families.llama import LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3, STARCODER2
from ddk_jax.models.families.rope import essential
from ddk_jax.models.families.table import Config, Family, Fields, Placement, Rows
from ddk_jax.models.families.unsupported import difference
from ddk_jax.models.families.windows import kinds_of, shortest_period
from ddk_jax.models.spec import ModelSpec

__all__ = [
    "FAMILIES",
    "Placement",
    "Rows",
    "canonical",
    "canonical_names",
    "config_from_spec",
    "head_and_table",
    "is_ignored",
    "placements",
    "spec_from_config",
]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLAMA, QWEN2, QWEN3, MISTRAL, PHI3, OLMO2, GEMMA2, GEMMA3, GPT2, BIGCODE, STARCODER2, NEOX,
    )
}  # fmt: skip
"""Every supported family by the name that `ModelSpec.family` has."""


def spec_from_config(config: Config) -> ModelSpec:
    """The decoder that a `config.json` describes.

    A key that is absent has the default of transformers' config class.

    Raises:
      UserError: unknown architecture, a setting that the decoder cannot compute, keys that
        contradict each other, or a value that is out of range.
    """
    return _read(_family_of_config(config), config)


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The `config.json` of a decoder, without ids of control tokens and dtype.

    Raises:
      UserError: unknown family, a spec that this family's files cannot express, or a shape that
        transformers refuses.
    """
    family = _family(spec)
    if family.even_heads and spec.hidden_size % spec.num_heads:
        raise UserError(
            f"hidden_size = {spec.hidden_size} is not a multiple of num_heads = {spec.num_heads}: "
            f"transformers refuses such a {family.architecture} even when head_dim is set"
        )
    config = _write(family, spec)
    lost = _differences(_read(family, config), spec)
    if lost:
        listed = ", ".join(f"{name} = {getattr(spec, name)!r}" for name in lost)
        raise UserError(
            f"files of the family {spec.family!r} cannot express {listed}{_who_can(spec, lost)}"
        )
    return config


def canonical(spec: ModelSpec) -> ModelSpec:
    """The same model, said in the way in which `spec_from_config` says it.

    Derived values are filled in, a pattern is the shortest one, and what has no effect is at its
    default.
    """
    default = ModelSpec()
    pattern = shortest_period(kinds_of(spec)) if spec.num_layers else spec.pattern
    changes: Fields = {"head_dim": spec.head_width, "pattern": pattern}
    if spec.attention_scale == spec.head_width**-0.5:
        changes["attention_scale"] = 0.0
    if "local" not in pattern:
        changes |= {"window": 0, "local_rope_theta": 0.0}
    elif spec.local_rope_theta == spec.rope_theta and spec.rope_scaling is None:
        changes["local_rope_theta"] = 0.0
    if spec.positions == "rope":
        changes["rope_scaling"] = essential(spec.rope_scaling)
    else:
        names = ("rope_theta", "rope_fraction", "rope_scaling", "local_rope_theta")
        changes |= {name: getattr(default, name) for name in names}
    return replace(spec, **changes)


def placements(spec: ModelSpec) -> list[Placement]:
    """Where every tensor of the model's files lies, in the order in which they are written.

    The placements of a fused tensor follow each other.
    """
    top, head, layer_rules = _family(spec).tensors(spec)
    found = [Placement(rule.name, rule.path, None, *rule[2:]) for rule in top]
    if not spec.tied_head:
        found.append(Placement(head.name, head.path, None, *head[2:]))
    length = len(spec.pattern)
    whole = spec.num_layers // length
    for layer in range(spec.num_layers):
        period, position = divmod(layer, length)
        group, stacked = ("layers", period) if period < whole else ("tail", None)
        for rule in layer_rules:
            path = (group, str(position), *rule.path)
            found.append(Placement(rule.name.format(layer=layer), path, stacked, *rule[2:]))
    return found


def head_and_table(spec: ModelSpec) -> tuple[str, str]:
    """Names of the LM head's tensor, which a tied model need not have, and of its equal."""
    top, head, _ = _family(spec).tensors(spec)
    table = next(rule for rule in top if rule.path == ("embed", "table"))
    return head.name, table.name


def canonical_names(spec: ModelSpec, names: Iterable[str]) -> dict[str, str]:
    """The names that the functions here use, by the names in a file.

    Files of a bare model, such as the hub's gpt2, lack the prefix of the causal model; and some
    tensors have had other names.
    """
    family, head = _family(spec), head_and_table(spec)[0]
    names = list(names)
    bare = not any(name.startswith(family.prefix) for name in names)
    known = {}
    for name in names:
        ours = family.renamed.get(name, name)
        known[name] = family.prefix + ours if bare and ours != head else ours
    return known


def is_ignored(spec: ModelSpec, name: str) -> bool:
    """Whether a tensor of this name may be left unread."""
    return name.endswith(_family(spec).ignored)


def _family(spec: ModelSpec) -> Family:
    if spec.family not in FAMILIES:
        raise UserError(f"model family {spec.family!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[spec.family]


def _family_of_config(config: Config) -> Family:
    model_type, architectures = config.get("model_type"), config.get("architectures")
    for family in FAMILIES.values():
        if model_type == family.model_type and architectures in (None, [family.architecture]):
            return family
    raise UserError(
        f"architectures = {architectures!r}, model_type = {model_type!r}: "
        + difference(architectures, {f.name: f.architecture for f in FAMILIES.values()})
    )


def _read(family: Family, config: Config) -> ModelSpec:
    found: Fields = dict(family.always)
    for part in family.parts:
        found |= part.read(config, found)
    try:
        return ModelSpec(family=family.name, **found)
    except ValueError as error:
        raise UserError(str(error)) from error


def _write(family: Family, spec: ModelSpec) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.written,
    }
    for part in family.parts:
        config |= part.write(spec)
    return config


def _differences(one: ModelSpec, other: ModelSpec) -> list[str]:
    """Fields in which two specs differ, apart from the family."""
    one, other = canonical(one), canonical(other)
    names = [field.name for field in fields(ModelSpec) if field.name != "family"]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def _who_can(spec: ModelSpec, lost: list[str]) -> str:
    """The families whose files have all these values or, if none has, who has which."""
    missing: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        try:
            found = _read(family, _write(family, replace(spec, family=family.name)))
        except UserError:
            continue
        missing[family.name] = _differences(found, spec)
    able = {
        name: [family for family, fields in missing.items() if name not in fields] for name in lost
    }
    together = [family for family in missing if all(family in each for each in able.values())]
    wholly = [family for family in together if not missing[family]]
    if best := wholly or together:
        return f"; {', '.join(best)} can"
    said = [f"{name}: {', '.join(each)}" for name, each in able.items() if each]
    return f"; the families that can are {'; '.join(said)}" if said else ""
