"""What a family is: its config keys, its tensors, and where each of them lies in our decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from ddk_jax.models.spec import ModelSpec

Config: TypeAlias = Mapping[str, Any]
"""The content of a config.json."""
Fields: TypeAlias = dict[str, Any]
"""Fields of a ModelSpec by name."""


class Rows(NamedTuple):
    """Which rows of a fused Hugging Face tensor are ours. A row is one output.

    Attributes:
      groups: the outputs come in this many equal groups (GPT-NeoX: one per head).
      start: first row of ours within a group.
      size: rows of ours within a group; groups * size is the number of our outputs.
      total: rows that a group has.
    """

    groups: int
    start: int
    size: int
    total: int


class TensorRule(NamedTuple):
    """One parameter of ours, and the Hugging Face tensor that holds the same numbers.

    Attributes:
      path: in the parameter tree; for a parameter of a layer, below that layer.
      name: Hugging Face name; `{layer}` stands for the number of the layer.
      inputs: None: the same layout. n: ours is [*inputs, *outputs] with n input axes, theirs is
        [outputs, inputs], each group flattened; for n = 0 a flat vector of outputs.
      conv: theirs is [inputs, outputs] instead (GPT-2's Conv1D).
      rows: which rows of theirs are ours; None: all.
    """

    path: tuple[str, ...]
    name: str
    inputs: int | None = None
    conv: bool = False
    rows: Rows | None = None


class Placement(NamedTuple):
    """Where a Hugging Face tensor, or some rows of it, lies in the parameter tree.

    Attributes:
      name: of the tensor; the placements that share one cover its rows exactly.
      path: of the leaf in the parameter tree.
      period: index on the leading axis of a stacked leaf; None for a leaf that is not stacked.
      inputs, conv, rows: as in `TensorRule`.
    """

    name: str
    path: tuple[str, ...]
    period: int | None
    inputs: int | None = None
    conv: bool = False
    rows: Rows | None = None


class Tensors(NamedTuple):
    """All tensors of a model.

    Attributes:
      top: outside the layers, the head excepted.
      head: the LM head of an untied model.
      layer: of one layer.
    """

    top: list[TensorRule]
    head: TensorRule
    layer: list[TensorRule]


@runtime_checkable
class Part(Protocol):
    """Some keys of config.json and the fields of the spec that say the same."""

    def read(self, config: Config, fields: Fields) -> Fields:
        """The fields, given those of the parts before this one.

        Raises:
          UserError: a value that is out of range, or that the decoder cannot compute.
        """
        ...

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """The keys. What they cannot express is found by reading them back."""
        ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one architecture maps to the decoder."""

    name: str
    """Value of `ModelSpec.family`."""
    architecture: str
    """Class name in `architectures` of config.json."""
    model_type: str
    """`model_type` in config.json."""
    always: Fields = field(default_factory=dict)
    """Fields that all models of the family share; where it says nothing, the spec's default."""
    parts: tuple[Part, ...]
    """All other fields, in the order in which they are read."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Keys that say nothing to us and something to other programs."""
    tensors: Callable[[ModelSpec], Tensors]
    """The tensors of a model, in the order in which they are written."""
    prefix: str
    """What the names of all tensors but the head start with; files of a bare model lack it."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Tensors that some files call otherwise: their names there, and ours."""
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    """Ends of names of tensors that old files hold and that follow from the config."""
    even_heads: bool = False
    """Whether transformers wants hidden_size to be a multiple of the heads, whatever head_dim."""


def matrix(
    path: tuple[str, str],
    name: str,
    *,
    inputs: int = 1,
    bias: bool = False,
    conv: bool = False,
    rows: Rows | None = None,
) -> list[TensorRule]:
    """A kernel, and its bias where it has one."""
    room, leaf = path
    rules = [TensorRule(path, f"{name}.weight", inputs, conv, rows)]
    if bias:
        rules.append(TensorRule((room, f"{leaf}_bias"), f"{name}.bias", 0, False, rows))
    return rules


def norm(spec: ModelSpec, path: str, name: str) -> list[TensorRule]:
    """The scale of a norm, and the bias of a layer norm."""
    rules = [TensorRule((path, "scale"), f"{name}.weight")]
    if spec.norm == "layer":
        rules.append(TensorRule((path, "bias"), f"{name}.bias"))
    return rules
