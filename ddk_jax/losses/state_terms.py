"""Terms of an objective that compare inner states of the models instead of their logits.

What a term needs to know of the two models is settled once (`StateTerm.bound`), when it is made:
which layers it compares, and the shapes of the maps that it learns.

Legend: n pairs of mapped layers, B rows, T tokens, S width of the student, U of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ddk_jax.losses.states import (
    LayerMap,
    evenly_spaced,
    explicit_map,
    hidden_cosine,
    hidden_mse,
    initial_projections,
    relation_kl,
)

StateLoss: TypeAlias = Literal["hidden_mse", "hidden_cosine", "relation_kl", "layer_cross_entropy"]


@runtime_checkable
class States(Protocol):
    """Inner states of a model: of layers out of a list, stacked in its order."""

    @property
    def hidden(self) -> Float[Array, "n B T S"]:
        """Hidden states."""
        ...

    @property
    def q(self) -> Float[Array, "n B T H D"]:
        """Queries, before the rotation."""
        ...

    @property
    def k(self) -> Float[Array, "n B T K D"]:
        """Keys, likewise."""
        ...

    @property
    def v(self) -> Float[Array, "n B T K D"]:
        """Values."""
        ...


class Shape(NamedTuple):
    """What a term has to know of a model."""

    layers: int
    width: int


@dataclass(frozen=True, kw_only=True)
class StateTerm:
    """A comparison of mapped layers.

    `pairs` of layers at equal distances over both models, the last ones included; or the layers
    that `student_layers` and `teacher_layers` name, pair by pair. Hidden states are counted as in
    transformers (0 the embeddings, L the normed final ones), the layers of queries, keys and values
    from 0 on.
    """

    loss: StateLoss
    """`layer_cross_entropy` has no teacher: it learns filters that predict the labels from chosen
    layers through the frozen LM head, TED's first stage (`states.filtered_readouts`)."""
    pairs: int = 1
    student_layers: tuple[int, ...] = ()
    teacher_layers: tuple[int, ...] = ()
    project: bool = True
    """Learn a map from the student's hidden states to the teacher's, layer by layer."""
    through: Literal["own", "teacher"] = "own"
    """Whose norm and LM head `layer_cross_entropy` predicts with. With the teacher's, filters of
    student and teacher lead to one space, in which TED's second stage compares them."""
    relation_heads: int = 0
    """Vectors that the queries, keys and values of a token are cut into (`relation_kl`)."""
    maps: LayerMap | None = None
    """The mapped layers; set by `bound`."""
    student_depth: int = 0
    """Layers of the student, and so the index of its normed final states; set by `bound`."""

    @staticmethod
    def settings(loss: str) -> tuple[str, ...]:
        """Names of the settings of a loss."""
        layers = ("pairs", "student_layers")
        return {
            "relation_kl": (*layers, "teacher_layers", "relation_heads"),
            "layer_cross_entropy": (*layers, "through"),
        }.get(loss, (*layers, "teacher_layers", "project"))

    @property
    def of_labels(self) -> bool:
        """Whether the labels are predicted, instead of a teacher's states."""
        return self.loss == "layer_cross_entropy"

    @property
    def of_hidden(self) -> bool:
        """Whether hidden states are compared; otherwise queries, keys and values."""
        return self.loss != "relation_kl"

    def bound(self, student: Shape, teacher: Shape) -> StateTerm:
        """The term for two models; `layer_cross_entropy` looks at the student alone.

        Raises:
          ValueError: layers that a model has not, or widths that cannot be compared.
        """
        less = 0 if self.of_hidden else 1
        theirs = self.teacher_layers
        if self.of_labels:
            teacher, theirs = student, self.student_layers
        if self.student_layers or theirs:
            maps = explicit_map(
                self.student_layers,
                theirs,
                student_last=student.layers - less,
                teacher_last=teacher.layers - less,
            )
        else:
            even = evenly_spaced(student.layers, teacher.layers, self.pairs)
            maps = LayerMap(*(tuple(i - less for i in layers) for layers in even))
        if self.of_hidden and not self.project and student.width != teacher.width:
            raise ValueError(
                f"{self.loss}: the student's states have {student.width} features, the teacher's "
                f"{teacher.width}: set project: true"
            )
        if not self.of_hidden and self.relation_heads < 1:
            raise ValueError(f"relation_heads = {self.relation_heads}: needs at least 1")
        return replace(self, maps=maps, student_depth=student.layers)

    def initial(self, key: Array, student: Shape, teacher: Shape) -> dict[str, Any]:
        """Learned parameters: `map`, [n, S, U], if there is one; [n, S, S] for the own head."""
        if not (self.of_hidden and self.project):
            return {}
        if self.of_labels and self.through == "own":
            teacher = student
        pairs = len(self._maps.student)
        return {"map": initial_projections(key, pairs, student.width, teacher.width)}

    def nats(
        self,
        params: dict[str, Any],
        student: States,
        teacher: States,
        layers: StateLayers,
        segment_ids: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
    ) -> Float[Array, "B T"]:
        """The value of every token; of relations in nats, of the others without a unit.

        Args:
          params: from `initial`, trained or not; a `teacher_map` among them is frozen.
          student: its states.
          teacher: likewise.
          layers: which layers the states are of.
          segment_ids: tokens see within equal ids.
          mask: tokens that count.
        """
        ours = _picked(self._maps.student, student, layers.student)
        theirs = _picked(self._maps.teacher, teacher, layers.teacher)
        if self.loss == "relation_kl":
            heads = self.relation_heads
            return relation_kl(ours[1:], theirs[1:], segment_ids, mask, relation_heads=heads)
        compare = {"hidden_mse": hidden_mse, "hidden_cosine": hidden_cosine}[self.loss]
        maps = {"student_map": params.get("map"), "teacher_map": params.get("teacher_map")}
        return compare(ours[0], theirs[0], mask, **maps)

    def picked(
        self, student: States, layers: StateLayers
    ) -> tuple[tuple[int, ...], Float[Array, "n B T S"]]:
        """The term's layers of the student, and their hidden states."""
        return self._maps.student, _picked(self._maps.student, student, layers.student)[0]

    @property
    def _maps(self) -> LayerMap:
        assert self.maps is not None, "not bound to models yet"
        return self.maps


class Chosen(NamedTuple):
    """Layers of one model that some term compares, in increasing order."""

    hidden: tuple[int, ...]
    qkv: tuple[int, ...]


class StateLayers(NamedTuple):
    """The same of both models."""

    student: Chosen
    teacher: Chosen


def state_layers(terms: Sequence[StateTerm]) -> StateLayers:
    """What the models have to keep for these terms."""

    def chosen(*, student: bool) -> Chosen:
        sets: tuple[set[int], set[int]] = set(), set()
        for term in terms:
            layers = term._maps.student if student else term._maps.teacher
            if student or not term.of_labels:
                sets[0 if term.of_hidden else 1].update(layers)
        return Chosen(tuple(sorted(sets[0])), tuple(sorted(sets[1])))

    return StateLayers(chosen(student=True), chosen(student=False))


def _picked(wanted: Sequence[int], states: States, there: Chosen) -> tuple[Array, ...]:
    """Hidden states, queries, keys and values of the wanted layers, out of those that were kept.

    What the term does not compare is returned as it is.
    """

    def of(x: Array, kept: tuple[int, ...]) -> Array:
        if tuple(wanted) == kept or any(layer not in kept for layer in wanted):
            return x
        # Slices, not a gather, whose gradient would be a scatter.
        return jnp.stack([x[kept.index(layer)] for layer in wanted])

    hidden = of(states.hidden, there.hidden)
    return hidden, *(of(x, there.qkv) for x in (states.q, states.k, states.v))
