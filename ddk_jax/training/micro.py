"""The objective on one micro-batch: forward passes of all models, then every term.

Legend: B rows, T tokens, K terms, D domains, E hidden, M teachers, n chosen layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, UInt32

from ddk_jax.losses.chunked import ChunkPlan, LossInputs, aligned_heads, sharded_objective
from ddk_jax.losses.objective import Objective, WeightedTerm, make_term, needs_teacher
from ddk_jax.losses.state_terms import StateLayers, StateTerm, state_layers
from ddk_jax.losses.states import filtered_readouts
from ddk_jax.losses.targets import Head, TeacherTargets
from ddk_jax.models.collect import NOTHING, Collect, Collected
from ddk_jax.models.decoder import segment_positions
from ddk_jax.models.lora import LoRA
from ddk_jax.parallel.mesh import DATA_AXES, PARAM_AXIS, VOCAB_AXIS, data_shards
from ddk_jax.training.state import Batch, TeacherRows

LABELS: Objective = (make_term("cross_entropy"),)


@runtime_checkable
class Model(Protocol):
    """What the steps need of a model, teacher or student."""

    def apply(
        self,
        params: Any,
        tokens: Array,
        segment_ids: Array,
        positions: Array,
        collect: Collect = NOTHING,
    ) -> tuple[Array, Collected]:
        """Normed final hidden states [B, T, E], and chosen inner states."""
        ...

    def head(self, params: Any) -> Head:
        """LM head."""
        ...

    def final_norm(self, params: Any, x_BTE: Array) -> Array:
        """The norm before the head."""
        ...


class Teachers(NamedTuple):
    """The frozen models that a student learns from, and how much from each."""

    models: tuple[Model, ...]
    domain_weights: Float[np.ndarray, "D M"]
    """Weight of every teacher in every domain; they are normalised over the teachers."""


class Frozen(NamedTuple):
    """Arrays that a step reads and does not change."""

    teachers: tuple[Any, ...] = ()
    """Parameters of every teacher."""
    objective: Any = None
    """What is frozen in terms of the objective, by their names. None: nothing."""
    student: Any = None
    """Parameters of a student of which adapters alone learn. None: all of it learns."""
    domain_weights: Float[Array, "D"] | None = None
    """Weights of the domains' means in the loss. None: every token counts the same."""


class Heads(NamedTuple):
    """LM heads with the same columns, and all rows on every device: made once in a step."""

    student: Head
    teachers: tuple[Head, ...]


class Forward(NamedTuple):
    """What a model makes of a micro-batch."""

    hidden: Float[Array, "B T E"]
    states: Collected


NatsOfTerms: TypeAlias = tuple[Float[Array, ""], Float[Array, "K B T"]]


@dataclass(frozen=True, kw_only=True)
class MicroLoss:
    """The objective as a function of parameters and rows.

    State terms compare with the first teacher.
    """

    student: Model
    teachers: Teachers | None
    objective: Objective
    plan: ChunkPlan
    mesh: Mesh
    freeze_student: bool = False
    """Whether only the parameters of the objective learn."""
    lora: LoRA | None = None
    """Adapters that learn, in place of the student itself."""

    def heads(self, params: Any, frozen: Frozen) -> Heads:
        """The heads, for any number of calls with these parameters."""
        ours = self.student.head(self._of_student(params, frozen))
        models = () if self.teachers is None else self.teachers.models
        theirs = tuple(m.head(p) for m, p in zip(models, frozen.teachers, strict=True))
        if needs_teacher(self.objective):  # before they are gathered: what is cut off stays away
            ours, theirs = aligned_heads(ours, theirs, self.plan, self.mesh, VOCAB_AXIS)
        return Heads(gathered(ours, self.mesh), tuple(gathered(h, self.mesh) for h in theirs))

    def _of_student(self, params: Any, frozen: Frozen) -> Any:
        """What the student's decoder reads."""
        of_student = params["student"]
        if self.lora is not None:
            of_student = self.lora.adapted(frozen.student, of_student)
        return jax.lax.stop_gradient(of_student) if self.freeze_student else of_student

    def __call__(
        self,
        params: Any,
        frozen: Frozen,
        micro: Batch,
        inputs: LossInputs,
        heads: Heads | None = None,
    ) -> NatsOfTerms:
        """The sum of scale * value over terms and tokens, and the values [K, B, T].

        Args:
          params: `student` and `objective`.
          frozen: everything else that the terms read.
          micro: rows.
          inputs: of the logit terms; the scales and temperatures of all.
          heads: of the same parameters, if made ahead; gradients flow into `params` all the same.
        """
        heads = heads or self.heads(params, frozen)
        of_student = self._of_student(params, frozen)
        of_ours, of_theirs = (Collect(hidden=h, qkv=p) for h, p in self._layers)
        ours = forward(self.student, of_student, micro, of_ours)
        theirs: tuple[Forward, ...] = ()
        if self.teachers is not None and needs_teacher(self.objective):
            with jax.named_scope("teacher"):
                theirs = teacher_forward(self.teachers, frozen.teachers, micro, of_theirs)
            targets = teacher_targets(self.teachers, heads.teachers, theirs, micro)
            inputs = inputs._replace(teacher=targets)
        head = self.student.head(of_student)
        with jax.named_scope("loss"):
            total, nats = self._on_logits(ours.hidden, head, inputs, heads.student)
            for index, term, loss in self._state_terms:
                learned = params["objective"].get(term.name, {})
                learned = learned | (frozen.objective or {}).get(term.name, {})
                scale = inputs.scale[index]
                if loss.of_labels:
                    norm, through = partial(self.student.final_norm, of_student), heads.student
                    if loss.through == "teacher" and self.teachers is not None:
                        norm = partial(self.teachers.models[0].final_norm, frozen.teachers[0])
                        through = heads.teachers[0]
                    value, values = self._from_layers(
                        loss, learned["map"], ours.states, norm, through, inputs, scale
                    )
                else:
                    segments = micro.segment_ids[:, :-1]
                    pair = ours.states, theirs[0].states
                    values = loss.nats(learned, *pair, self._layers, segments, scale > 0)
                    value = jnp.sum(scale * values)
                total, nats = total + value, nats.at[index].set(values)
        return total, nats

    @property
    def _state_terms(self) -> list[tuple[int, WeightedTerm, StateTerm]]:
        terms = enumerate(self.objective)
        return [(k, term, term.loss) for k, term in terms if isinstance(term.loss, StateTerm)]

    @property
    def _layers(self) -> StateLayers:
        """Layers that the terms compare, of student and teacher."""
        losses = [loss for _, _, loss in self._state_terms]
        return state_layers(losses)

    def _on_logits(self, hidden: Array, head: Head, inputs: LossInputs, whole: Head) -> NatsOfTerms:
        """The terms on logits, in their places among all terms."""
        index = [k for k, t in enumerate(self.objective) if not isinstance(t.loss, StateTerm)]
        nats = jnp.zeros_like(inputs.scale)
        if not index:
            return jnp.float32(0), nats
        terms, places = tuple(self.objective[k] for k in index), jnp.array(index)
        scale, temperature = inputs.scale[places], inputs.temperature[places]
        chosen = inputs._replace(scale=scale, temperature=temperature)
        total, values = on_mesh(hidden, head, chosen, terms, self.plan, self.mesh, whole)
        return total, nats.at[places].set(values)

    def _from_layers(
        self,
        loss: StateTerm,
        filters: Float[Array, "n S F"],
        states: Collected,
        norm: Callable[[Array], Array],
        head: Head,
        inputs: LossInputs,
        scale: Float[Array, "B T"],
    ) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
        """Cross-entropy on the labels, predicted from filtered layers: mean over the layers."""
        chosen, hidden = loss.picked(states, self._layers)
        normed = [i == loss.student_depth for i in chosen]
        read = filtered_readouts(hidden, filters, scale > 0, norm, normed=normed)
        n, B, T, E = read.shape

        def repeated(x: Array) -> Array:
            """Every row n times; rows stay in the outer axis, which the devices share."""
            return jnp.repeat(x, n, axis=0)

        tiled = LossInputs(
            teacher=None,
            labels=repeated(inputs.labels),
            role=repeated(inputs.role),
            draw=repeated(inputs.draw),
            scale=repeated(scale / n)[None],
            temperature=jnp.ones(1, jnp.float32),
        )
        rows = jnp.moveaxis(read, 0, 1).reshape(B * n, T, E)
        plan = replace(self.plan, head_gradient=False)
        value, nats = on_mesh(rows, head, tiled, LABELS, plan, self.mesh, head)
        return value, jnp.mean(nats[0].reshape(B, n, T), axis=1)


def forward(
    model: Model, params: Any, rows: Batch | TeacherRows, collect: Collect = NOTHING
) -> Forward:
    """Hidden states of all tokens but the last of every row."""
    tokens, segments = rows.tokens[:, :-1], rows.segment_ids[:, :-1]
    return Forward(*model.apply(params, tokens, segments, segment_positions(segments), collect))


def paired(micro: Batch) -> Bool[Array, "*axes"]:
    """Whether the teacher has read the same text somewhere; always, if it has the same tokens."""
    if micro.teacher is None:
        return jnp.ones(micro.tokens[..., 1:].shape, bool)
    return micro.teacher.position >= 0


def on_mesh(
    hidden: Float[Array, "B T E"],
    head: Head,
    inputs: LossInputs,
    terms: Objective,
    plan: ChunkPlan,
    mesh: Mesh,
    whole: Head,
) -> NatsOfTerms:
    """`sharded_objective` on our mesh; `whole` is the head once more, `gathered`."""
    axes: Any = {"data_axes": DATA_AXES, "vocab_axis": VOCAB_AXIS}
    return sharded_objective(hidden, head, inputs, terms, plan, mesh=mesh, gathered=whole, **axes)


def gathered(head: Head, mesh: Mesh) -> Head:
    """The head with all rows on every device, and its columns where they were. No gradient flows.

    To be called outside of a loop over micro-batches, which would gather it in each of them.
    """
    if data_shards(mesh) == 1:
        return jax.lax.stop_gradient(head)
    kernel = head.kernel
    rows, columns = (
        axis if size % mesh.shape[axis] == 0 else None
        for size, axis in zip(kernel.shape, (PARAM_AXIS, VOCAB_AXIS), strict=True)
    )
    # In two steps, for the partitioner knows none from a table whose rows alone are shared.
    for axes in ((rows, columns), (None, columns)):
        where = NamedSharding(mesh, PartitionSpec(*axes))
        kernel = jax.lax.with_sharding_constraint(kernel, where)
    return jax.lax.stop_gradient(head._replace(kernel=kernel))


def label_inputs(micro: Batch, scale: Float[Array, "K B T"]) -> LossInputs:
    """Labels, roles and scales; no teacher, temperature 1, and nothing to draw from."""
    labels = micro.tokens[:, 1:]
    draw = jnp.zeros(labels.shape, jnp.uint32)
    ones = jnp.ones(scale.shape[0], jnp.float32)
    return LossInputs(None, labels, micro.role[:, 1:], draw, scale, ones)


def draws(shape: tuple[int, ...], step: Array, seed: int) -> UInt32[Array, "*axes"]:
    """A number for every token of every step: how the rows are cut makes no difference."""
    size = math.prod(shape)
    offset = step.astype(jnp.uint32) * jnp.uint32(size % 2**32)
    # Runs with neighbouring seeds are moved far apart (2^32 over the golden ratio).
    offset = offset + jnp.uint32(seed * 0x9E3779B9 % 2**32)
    return (offset + jnp.arange(size, dtype=jnp.uint32)).reshape(shape)


def teacher_targets(
    teachers: Teachers, heads: tuple[Head, ...], made: tuple[Forward, ...], micro: Batch
) -> TeacherTargets:
    """What the terms on logits read; a single teacher needs no weights."""
    hidden = tuple(part.hidden for part in made)
    if len(heads) == 1:
        return TeacherTargets(hidden, heads)
    by_row = jnp.asarray(teachers.domain_weights, jnp.float32)[micro.domain]
    shape = (len(heads), *hidden[0].shape[:2])
    return TeacherTargets(hidden, heads, jnp.broadcast_to(by_row.T[:, :, None], shape))


def teacher_forward(
    teachers: Teachers, params: tuple[Any, ...], micro: Batch, collect: Collect = NOTHING
) -> tuple[Forward, ...]:
    """Every teacher's; inner states of the first one only. No gradient flows back.

    From a teacher with tokens of its own, the hidden states where it has read the same text.
    """
    pairs = zip(teachers.models, params, strict=True)
    first = [collect, *(NOTHING for _ in params[1:])]
    rows = micro.teacher or micro
    made = tuple(
        jax.lax.stop_gradient(forward(model, p, rows, chosen))
        for (model, p), chosen in zip(pairs, first, strict=True)
    )
    if micro.teacher is None:
        return made
    where = jnp.maximum(micro.teacher.position, 0)[:, :, None]
    return tuple(f._replace(hidden=jnp.take_along_axis(f.hidden, where, axis=1)) for f in made)
