"""Model families: what Hugging Face calls, and how it lays out, the parts of our decoder.

Data and small functions only; `hf.py` reads and writes files with them. A family is a table of
tensors and two functions between its `config.json` and a `ModelSpec`. To add one, write these three
beside Llama's and list the family in `FAMILIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ddk_jax.errors import UserError
from ddk_jax.models.spec import ModelSpec

Config = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorRule:
    """One kind of tensor: our parameter and the Hugging Face tensor that holds the same numbers."""

    path: tuple[str, ...]
    """Path in the parameter tree; for a tensor of a layer, below that layer."""
    name: str
    """Hugging Face name; `{layer}` stands for the number of the layer."""
    inputs: int = 0
    """Number of leading axes of ours that are contracted with the input. Ours is [*inputs,
    *outputs], theirs [outputs, inputs], each group flattened. 0: the same layout."""


@dataclass(frozen=True)
class Family:
    """How one architecture maps to the decoder."""

    name: str
    """Value of `ModelSpec.family`."""
    architecture: str
    """Class name in `architectures` of config.json."""
    model_type: str
    """`model_type` in config.json."""
    top: tuple[TensorRule, ...]
    """Tensors outside the layers, the head excepted."""
    head: TensorRule
    """The LM head of an untied model."""
    layer: tuple[TensorRule, ...]
    """Tensors of one layer."""
    ignored: tuple[str, ...]
    """Ends of names of tensors that old files hold and that follow from the config."""
    spec_from_config: Callable[[Config], ModelSpec]
    config_from_spec: Callable[[ModelSpec], dict[str, Any]]


class Placement(NamedTuple):
    """Where one Hugging Face tensor lies in the parameter tree.

    Attributes:
      name: of the tensor.
      path: of the leaf in the parameter tree.
      period: index on the leading axis of a stacked leaf; None for a leaf that is not stacked.
      inputs: as in `TensorRule`.
    """

    name: str
    path: tuple[str, ...]
    period: int | None
    inputs: int


def family_of_config(config: Config) -> Family:
    """The family of a `config.json`.

    Raises:
      UserError: it is of no supported family.
    """
    model_type, architectures = config.get("model_type"), config.get("architectures")
    for family in FAMILIES.values():
        if model_type == family.model_type and architectures in (None, [family.architecture]):
            return family
    supported = ", ".join(f"{f.architecture} ({f.model_type})" for f in FAMILIES.values())
    raise UserError(
        f"architectures = {architectures}, model_type = {model_type!r} is not supported; "
        f"supported: {supported}"
    )


def spec_from_config(config: Config) -> ModelSpec:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: unknown architecture, a feature that the decoder does not have, or a value that is
        missing or out of range.
    """
    family = family_of_config(config)
    try:
        return family.spec_from_config(config)
    except UserError:
        raise
    except ValueError as error:  # from ModelSpec
        raise UserError(str(error)) from error


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The `config.json` of a decoder, without token ids and dtype.

    Raises:
      UserError: unknown family, or a shape that transformers refuses.
    """
    return _family(spec).config_from_spec(spec)


def placements(spec: ModelSpec) -> list[Placement]:
    """Every tensor of the model's files, in the order in which they are written."""
    family = _family(spec)
    found = [Placement(rule.name, rule.path, None, rule.inputs) for rule in family.top]
    if not spec.tied_head:
        found.append(Placement(family.head.name, family.head.path, None, family.head.inputs))
    period_length = len(spec.pattern)
    whole = spec.num_layers // period_length
    for layer in range(spec.num_layers):
        period, position = divmod(layer, period_length)
        group = "layers" if period < whole else "tail"
        for rule in family.layer:
            path = (group, str(position), *rule.path)
            stacked = period if group == "layers" else None
            found.append(Placement(rule.name.format(layer=layer), path, stacked, rule.inputs))
    return found


def head_and_table(spec: ModelSpec) -> tuple[str, str]:
    """Names of the LM head's tensor, which a tied model need not have, and of its equal."""
    family = _family(spec)
    table = next(rule for rule in family.top if rule.path == ("embed", "table"))
    return family.head.name, table.name


def is_ignored(spec: ModelSpec, name: str) -> bool:
    """Whether a tensor of this name may be left unread."""
    return name.endswith(_family(spec).ignored)


def hf_shape(shape: Shape, inputs: int) -> Shape:
    """Shape of the Hugging Face tensor for a parameter of one layer."""
    if not inputs:
        return shape
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def _family(spec: ModelSpec) -> Family:
    if spec.family not in FAMILIES:
        raise UserError(f"model family {spec.family!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[spec.family]


def _integer(config: Config, key: str, default: int | None = None) -> int:
    """A positive integer; absent or null means the default."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{key} = {value!r}: expected a positive integer")
    return value


def _number(config: Config, key: str, default: float) -> float:
    """A positive finite number; absent or null means the default."""
    value = config.get(key)
    value = default if value is None else value
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not math.isfinite(value) or value <= 0:
        raise UserError(f"{key} = {value!r}: expected a positive number")
    return float(value)


def _flag(config: Config, key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{key} = {value!r}: expected true or false")
    return value


def _rope_theta(config: Config, default: float) -> float:
    """Base of plain rotary positions, from the keys of new and of old files.

    New files have `rope_parameters` {rope_theta, rope_type, ...}; old ones `rope_theta` and, where
    positions are scaled, `rope_scaling` {type or rope_type, ...}.
    """
    found = {"rope_theta": _number(config, "rope_theta", default)} if "rope_theta" in config else {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        if not isinstance(rope, Mapping):
            raise UserError(f"{key} = {rope!r}: expected an object")
        nested = any(isinstance(value, Mapping) for value in rope.values())
        if nested or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise UserError(
                f"{key} = {rope!r}: scaled rotary positions, or different ones by layer, are not "
                "supported yet, only rope_type 'default'"
            )
        _refuse(rope, {"partial_rotary_factor": 1.0})
        if "rope_theta" in rope:
            found[f"{key}.rope_theta"] = _number(rope, "rope_theta", default)
    if len(set(found.values())) > 1:
        said = ", ".join(f"{key} = {value:g}" for key, value in found.items())
        raise UserError(f"{said}: these must be equal; correct or remove the wrong one")
    return next(iter(found.values()), default)


def _refuse(config: Config, wanted: Mapping[str, Any]) -> None:
    """Refuse settings that change the arithmetic; absent or null means the wanted value."""
    for key, value in wanted.items():
        if config.get(key) not in (None, value):
            raise UserError(f"{key} = {config[key]!r} is not supported, only {value!r}")


_LLAMA_FIXED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}


def _llama_spec(config: Config) -> ModelSpec:
    # Where a key is absent, the value is the default of transformers' LlamaConfig, not ours.
    _refuse(config, {**_LLAMA_FIXED, "partial_rotary_factor": 1.0, "quantization_config": None})
    hidden, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    return ModelSpec(
        family="llama",
        vocab_size=_integer(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=_integer(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_integer(config, "num_key_value_heads", heads),
        # Not hidden / heads where the file says otherwise.
        head_dim=_integer(config, "head_dim", hidden // heads),
        ffn_size=_integer(config, "intermediate_size"),
        rope_theta=_rope_theta(config, 10_000.0),
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        tied_head=_flag(config, "tie_word_embeddings", False),
        max_positions=_integer(config, "max_position_embeddings", 2048),
    )


def _llama_config(spec: ModelSpec) -> dict[str, Any]:
    if spec.hidden_size % spec.num_heads:
        raise UserError(
            f"hidden_size = {spec.hidden_size} is not a multiple of num_heads = {spec.num_heads}: "
            "transformers refuses such a Llama even when head_dim is set"
        )
    return {
        "architectures": [LLAMA.architecture],
        "model_type": LLAMA.model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.ffn_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_width,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        # transformers 5 reads rope_parameters; older versions and other programs the other two.
        "rope_parameters": {"rope_theta": spec.rope_theta, "rope_type": "default"},
        "rope_theta": spec.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": spec.tied_head,
        **_LLAMA_FIXED,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
    }


_LLAMA_LAYER = "model.layers.{layer}."

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    top=(
        TensorRule(("embed", "table"), "model.embed_tokens.weight"),
        TensorRule(("norm", "scale"), "model.norm.weight"),
    ),
    head=TensorRule(("head", "kernel"), "lm_head.weight", 1),
    layer=(
        TensorRule(("attn_norm", "scale"), _LLAMA_LAYER + "input_layernorm.weight"),
        TensorRule(("attn", "q"), _LLAMA_LAYER + "self_attn.q_proj.weight", 1),
        TensorRule(("attn", "k"), _LLAMA_LAYER + "self_attn.k_proj.weight", 1),
        TensorRule(("attn", "v"), _LLAMA_LAYER + "self_attn.v_proj.weight", 1),
        TensorRule(("attn", "o"), _LLAMA_LAYER + "self_attn.o_proj.weight", 2),
        TensorRule(("mlp_norm", "scale"), _LLAMA_LAYER + "post_attention_layernorm.weight"),
        TensorRule(("mlp", "gate"), _LLAMA_LAYER + "mlp.gate_proj.weight", 1),
        TensorRule(("mlp", "up"), _LLAMA_LAYER + "mlp.up_proj.weight", 1),
        TensorRule(("mlp", "down"), _LLAMA_LAYER + "mlp.down_proj.weight", 1),
    ),
    ignored=(".rotary_emb.inv_freq",),
    spec_from_config=_llama_spec,
    config_from_spec=_llama_config,
)

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA,)}
"""Every supported family by the name that `ModelSpec.family` has."""
