"""Every loss on logits with a float64 reference of it: a new one gets all laws for one entry here.

A reference sees logits `[..., V]` of student and teacher, labels `[...]` and a temperature, and
gives nats `[...]`. It shares no code with the package. `base` are the student's logits that
quantities without a gradient are made from: for differences `student` moves and `base` stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from quick import QUICK

from ddk_jax.losses.bild import bild
from ddk_jax.losses.divergences import (
    ChunkView,
    cross_entropy,
    forward_kl,
    generalised_jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    spherical_kl,
    symmetric_kl,
    total_variation,
)
from ddk_jax.losses.ranked import adaptive_kl, top_k_overlap, uld
from ddk_jax.losses.sparse import draw_targets, sampled_cross_entropy, sampled_kl
from ddk_jax.losses.targets import clipped_excess
from ddk_jax.losses.truncated import bounded_kl, top_k_kl, top_p_kl


def compiled(function: Callable[..., Any], *arrays: Any, **static: Any) -> Any:
    """The result of a function of arrays, as one program: many small ones take longer."""
    return jax.jit(partial(function, **static), compiler_options=QUICK)(*arrays)


class Logits(NamedTuple):
    """What the references read; float64, any leading axes."""

    student: np.ndarray
    teacher: np.ndarray
    labels: np.ndarray
    draw: np.ndarray
    temperature: float
    base: np.ndarray


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def ref_kl(log_a: np.ndarray, log_b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.where(np.exp(log_a) > 0, np.exp(log_a) * (log_a - log_b), 0).sum(axis=-1)


def softmaxes(x: Logits) -> tuple[np.ndarray, np.ndarray]:
    """log p, log q."""
    return log_softmax(x.teacher / x.temperature), log_softmax(x.student / x.temperature)


def mixed(log_p: np.ndarray, log_q: np.ndarray, weight: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(weight * np.exp(log_p) + (1 - weight) * np.exp(log_q))


def order(z: np.ndarray) -> np.ndarray:
    """Ids by descending value, ties by the lowest id."""
    return np.argsort(-z, axis=-1, kind="stable")


def there(z: np.ndarray) -> np.ndarray:
    return z > -1e29


def ref_cross_entropy(x: Logits) -> np.ndarray:
    log_q = log_softmax(x.student)
    labels = np.broadcast_to(x.labels, x.student.shape[:-1])
    return -np.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]


def ref_clipped_excess(x: Logits) -> np.ndarray:
    student, teacher = (ref_cross_entropy(x._replace(student=z)) for z in (x.base, x.teacher))
    return np.maximum(student - teacher, 0) + 0 * x.student[..., 0]


def ref_forward(x: Logits) -> np.ndarray:
    return ref_kl(*softmaxes(x))


def ref_reverse(x: Logits) -> np.ndarray:
    return ref_kl(*softmaxes(x)[::-1])


def ref_skew(x: Logits, alpha: float) -> np.ndarray:
    log_p, log_q = softmaxes(x)
    return ref_kl(log_p, mixed(log_p, log_q, alpha))


def ref_skew_reverse(x: Logits, alpha: float) -> np.ndarray:
    log_p, log_q = softmaxes(x)
    return ref_kl(log_q, mixed(log_p, log_q, 1 - alpha))


def ref_symmetric(x: Logits, forward_weight: float) -> np.ndarray:
    return ref_weighted(x, forward_weight)


def ref_total_variation(x: Logits) -> np.ndarray:
    log_p, log_q = softmaxes(x)
    return 0.5 * np.abs(np.exp(log_p) - np.exp(log_q)).sum(axis=-1)


def ref_jsd(x: Logits, beta: float) -> np.ndarray:
    log_p, log_q = softmaxes(x)
    log_m = mixed(log_p, log_q, beta)
    return beta * ref_kl(log_p, log_m) + (1 - beta) * ref_kl(log_q, log_m)


def ref_weighted(x: Logits, weight: np.ndarray | float) -> np.ndarray:
    log_p, log_q = softmaxes(x)
    return weight * ref_kl(log_p, log_q) + (1 - weight) * ref_kl(log_q, log_p)


def ref_adaptive(x: Logits, mu: float, candidates: int) -> np.ndarray:
    log_p, log_q = softmaxes(x._replace(student=x.base))
    p, gap = np.exp(log_p), np.abs(np.exp(log_p) - np.exp(log_q))
    ids = order(x.teacher)
    head = np.cumsum(np.take_along_axis(p, ids, axis=-1), axis=-1) <= mu
    head[..., 0] = True
    head[..., candidates or ids.shape[-1] :] = False
    sorted_gap = np.take_along_axis(gap, ids, axis=-1)
    total = sorted_gap.sum(axis=-1)
    return ref_weighted(x, np.where(head, sorted_gap, 0).sum(axis=-1) / np.where(total, total, 1))


def ref_spherical(x: Logits, scale: float | str) -> np.ndarray:
    def moments(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kept = np.ma.masked_array(np.where(there(z), z, 0), ~there(z))
        deviation = np.sqrt(kept.var(axis=-1, keepdims=True) + 1e-9)
        return np.asarray(kept.mean(axis=-1, keepdims=True)), np.asarray(deviation)

    m = moments(x.teacher)[1] if scale == "teacher" else scale

    def log_p(z: np.ndarray) -> np.ndarray:
        mean, deviation = moments(z)
        with np.errstate(over="ignore"):
            standard = np.where(there(z), m * (z - mean) / deviation, z)
        return log_softmax(standard / x.temperature)

    return ref_kl(log_p(x.teacher), log_p(x.student))


def ref_bild(x: Logits, k: int, lead: str) -> np.ndarray:
    total = np.zeros(x.student.shape[:-1])
    for name, leader in (("teacher", x.teacher), ("student", x.student)):
        if lead in ("both", name):
            leader, _ = np.broadcast_arrays(leader, x.student)
            teacher, _ = np.broadcast_arrays(x.teacher, x.student)
            for at in np.ndindex(total.shape):
                ids = order(leader[at])[:k]
                a, b = teacher[at][ids] / x.temperature, x.student[at][ids] / x.temperature
                pairs = [(m, n) for m in range(k) for n in range(m + 1, k)]
                pairs = [pair for pair in pairs if all(there(z[list(pair)]).all() for z in (a, b))]
                if pairs:
                    da, db = (np.array([z[m] - z[n] for m, n in pairs]) for z in (a, b))
                    total[at] += ref_kl(log_softmax(da), log_softmax(db))
    return total


def ref_kept(x: Logits, kept: np.ndarray, renormalise: str, tail: bool) -> np.ndarray:
    both = softmaxes(x)
    shape = np.broadcast_shapes(kept.shape, both[1].shape)
    kept, *both = (np.broadcast_to(z, shape) for z in (kept, *both))
    total = np.zeros(shape[:-1])
    for at in np.ndindex(total.shape):
        if not kept[at].any():
            continue
        heads = [z[at][kept[at]] for z in both]
        normal = {"none": (), "teacher": (0,), "both": (0, 1)}[renormalise]
        heads = [log_softmax(z) if i in normal else z for i, z in enumerate(heads)]
        if tail and not kept[at].all():
            with np.errstate(divide="ignore"):
                tops = [max(np.max(z[at][~kept[at]]), -1e30) for z in both]
                rests = [
                    top + np.log(np.sum(np.exp(z[at][~kept[at]] - top)))
                    for top, z in zip(tops, both, strict=True)
                ]
            heads = [np.append(*parts) for parts in zip(heads, rests, strict=True)]
        total[at] = ref_kl(*heads)
    return total


def among_first(z: np.ndarray, counts: np.ndarray | int) -> np.ndarray:
    rank = np.argsort(order(z), axis=-1)
    return rank < np.asarray(counts)[..., None]


def ref_top_k(x: Logits, k: int, renormalise: str, tail: bool) -> np.ndarray:
    return ref_kept(x, among_first(x.teacher, k), renormalise, tail)


def ref_top_p(x: Logits, p: float, candidates: int, renormalise: str, tail: bool) -> np.ndarray:
    probabilities = np.exp(softmaxes(x)[0])
    mass = np.cumsum(np.take_along_axis(probabilities, order(x.teacher), axis=-1), axis=-1)
    counts = 1 + (mass[..., :-1] < p).sum(axis=-1)
    counts = np.minimum(counts, candidates or mass.shape[-1])
    return ref_kept(x, among_first(x.teacher, counts), renormalise, tail)


def ref_bounded(x: Logits, lower: float, upper: float, keep_label: bool) -> np.ndarray:
    p = np.exp(softmaxes(x)[0])
    kept = (p >= lower) & (p <= upper)
    if keep_label:
        kept = kept | (np.arange(p.shape[-1]) == x.labels[..., None])
    return ref_kept(x, kept, "both", False)


def ref_uld(x: Logits, candidates: int) -> np.ndarray:
    p, q = (np.flip(np.sort(np.exp(z), axis=-1), axis=-1) for z in softmaxes(x))
    width = max(p.shape[-1], q.shape[-1])
    p, q = (np.concatenate([z, np.zeros((*z.shape[:-1], width - z.shape[-1]))], -1) for z in (p, q))
    if not candidates:
        return np.abs(p - q).sum(axis=-1)
    rest = np.abs(p[..., candidates:].sum(axis=-1) - q[..., candidates:].sum(axis=-1))
    return np.abs(p - q)[..., :candidates].sum(axis=-1) + rest


def ref_overlap(x: Logits, k: int) -> np.ndarray:
    return (among_first(x.teacher, k) & among_first(x.student, k)).sum(axis=-1) / k


def ref_sampled_kl(x: Logits, samples: int, proposal: float) -> np.ndarray:
    return ref_sampled(x, samples, proposal, entropy=True)


def ref_sampled(x: Logits, samples: int, proposal: float, *, entropy: bool = False) -> np.ndarray:
    """Of the ids that the package draws; what they weigh is worked out here."""
    ids = np.asarray(drawn_ids(x.teacher, x.draw, x.temperature, samples, proposal))
    log_p, log_q = softmaxes(x)
    log_r = log_softmax(proposal * x.teacher / x.temperature)
    log_q = np.take_along_axis(log_q, np.broadcast_to(ids, (*log_q.shape[:-1], samples)), axis=-1)
    log_p, log_r = (np.take_along_axis(z, ids, axis=-1) for z in (log_p, log_r))
    weights = np.exp(log_p - log_r) / samples
    return np.sum(weights * ((log_p if entropy else 0) - log_q), axis=-1)


@partial(jax.jit, static_argnums=(3, 4), compiler_options=QUICK)
def _drawn_ids(
    teacher: jax.Array, draw: jax.Array, temperature: jax.Array, samples: int, proposal: float
) -> jax.Array:
    made = draw_targets(teacher, draw, samples=samples, proposal=proposal, temperature=temperature)
    return made.ids


def drawn_ids(
    teacher: np.ndarray, draw: np.ndarray, temperature: float, samples: int, proposal: float
) -> jax.Array:
    return _drawn_ids(
        jnp.asarray(teacher, jnp.float32), draw, jnp.float32(temperature), samples, proposal
    )


class Case(NamedTuple):
    """A loss with settings, and what is special about it."""

    loss: Callable[..., Any]
    reference: Callable[..., np.ndarray]
    """Takes the same settings."""
    settings: dict[str, Any] = {}  # noqa: RUF012 - never written to
    temperature: bool = True
    """Whether it has one."""
    zero: bool = True
    """Whether it is 0 where student and teacher agree."""
    kink: bool = False
    """Whether its gradient jumps there, so that rounding decides what it is."""
    nonnegative: bool = True
    named: bool = False
    """Whether its value may change when the entries of the vocabulary are renamed alike."""
    infinite: bool = False
    """Whether it is +inf where the teacher rules out an entry that the student does not."""
    sorts: bool = False
    """Whether it gathers a sharded vocabulary."""
    metric: bool = False
    """Whether it has no gradient, and does not show a NaN."""


BUCKET = {"renormalise": "none", "tail": True}
HEAD = {"renormalise": "none", "tail": False}
TEACHER = {"renormalise": "teacher", "tail": False}
BOTH = {"renormalise": "both", "tail": False}
BOUNDS = {"lower": 0.02, "upper": 0.2}
DRAWS = {"samples": 5, "proposal": 0.7}

CASES: dict[str, Case] = {
    "cross_entropy": Case(cross_entropy, ref_cross_entropy, temperature=False, zero=False),
    "forward_kl": Case(forward_kl, ref_forward),
    "reverse_kl": Case(reverse_kl, ref_reverse, infinite=True),
    "jsd 0.1": Case(generalised_jsd, ref_jsd, {"beta": 0.1}),
    "jsd 0.5": Case(generalised_jsd, ref_jsd, {"beta": 0.5}),
    "jsd 0.9": Case(generalised_jsd, ref_jsd, {"beta": 0.9}),
    "skew_kl": Case(skew_kl, ref_skew, {"alpha": 0.1}),
    "skew_reverse_kl": Case(skew_reverse_kl, ref_skew_reverse, {"alpha": 0.1}),
    "symmetric_kl": Case(symmetric_kl, ref_symmetric, {"forward_weight": 0.3}, infinite=True),
    "total_variation": Case(total_variation, ref_total_variation, kink=True),
    "spherical_kl": Case(spherical_kl, ref_spherical, {"scale": "teacher"}),
    "spherical_kl 2": Case(spherical_kl, ref_spherical, {"scale": 2.0}),
    "adaptive_kl": Case(
        adaptive_kl, ref_adaptive, {"mu": 0.5, "candidates": 0}, infinite=True, sorts=True
    ),
    "adaptive_kl 3": Case(adaptive_kl, ref_adaptive, {"mu": 0.7, "candidates": 3}, infinite=True),
    "bild": Case(bild, ref_bild, {"k": 8, "lead": "both"}),
    "bild teacher": Case(bild, ref_bild, {"k": 8, "lead": "teacher"}),
    "bild student": Case(bild, ref_bild, {"k": 8, "lead": "student"}),
    "bild 4": Case(bild, ref_bild, {"k": 4, "lead": "both"}),
    "top_k_kl": Case(top_k_kl, ref_top_k, {"k": 8, **BUCKET}),
    "top_k_kl head": Case(top_k_kl, ref_top_k, {"k": 8, **HEAD}, nonnegative=False),
    "top_k_kl teacher": Case(top_k_kl, ref_top_k, {"k": 8, **TEACHER}, zero=False),
    "top_k_kl both": Case(top_k_kl, ref_top_k, {"k": 8, **BOTH}),
    "top_p_kl": Case(top_p_kl, ref_top_p, {"p": 0.8, "candidates": 0, **BUCKET}, sorts=True),
    "top_p_kl 4": Case(top_p_kl, ref_top_p, {"p": 0.8, "candidates": 4, **BOTH}),
    "bounded_kl": Case(bounded_kl, ref_bounded, {**BOUNDS, "keep_label": True}),
    "bounded_kl free": Case(bounded_kl, ref_bounded, {**BOUNDS, "keep_label": False}),
    "sampled_kl": Case(sampled_kl, ref_sampled_kl, DRAWS, nonnegative=False, named=True),
    "sampled_cross_entropy": Case(
        sampled_cross_entropy, ref_sampled, DRAWS, zero=False, named=True
    ),
    "uld": Case(uld, ref_uld, {"candidates": 0}, kink=True, sorts=True),
    "uld 5": Case(uld, ref_uld, {"candidates": 5}, kink=True),
    "clipped_excess": Case(clipped_excess, ref_clipped_excess, temperature=False),
    "top_k_overlap": Case(
        top_k_overlap, ref_overlap, {"k": 8}, temperature=False, zero=False, metric=True
    ),
}


PLAIN = [name for name in CASES if " " not in name or name in ("jsd 0.5", "top_p_kl 4")]
"""One case of every loss."""


def nats_of(name: str, view: ChunkView, temperature: jax.Array) -> jax.Array:
    """The loss called `name` in `CASES`."""
    case = CASES[name]
    given = {"temperature": temperature} if case.temperature else {}
    return case.loss(view, **given, **case.settings)


Answers = dict[str, tuple[np.ndarray, np.ndarray]]
"""Nats [N] and gradient [N, V] of their sum, by name."""


def value_and_gradient(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array,
    draw: jax.Array,
    temperature: jax.Array,
    *,
    names: Iterable[str] = tuple(CASES),
    shards: int = 1,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Of many losses at once, so that there is one program to compile."""

    def of(name: str) -> tuple[jax.Array, jax.Array]:
        def total(student: jax.Array) -> tuple[jax.Array, jax.Array]:
            view = ChunkView(student, teacher, labels, jnp.ones_like(labels), draw, shards)
            nats = nats_of(name, view, temperature)
            return jnp.sum(nats), nats

        with jax.named_scope(name.replace(" ", "_")):
            gradient, nats = jax.grad(total, has_aux=True)(student)
        return nats, gradient

    return {name: of(name) for name in names}


_compiled = jax.jit(value_and_gradient, compiler_options=QUICK)


def answers(x: Logits) -> Answers:
    """What the package says; always 6 tokens and 32 entries, so that it is compiled once."""
    assert x.student.shape == (6, 32), x.student.shape
    found = _compiled(
        x.student.astype(np.float32),
        x.teacher.astype(np.float32),
        x.labels.astype(np.int32),
        x.draw,
        jnp.float32(x.temperature),
    )
    return jax.tree.map(np.asarray, found)


def reference(name: str, x: Logits) -> np.ndarray:
    """What the reference says; the logits are rounded as the package sees them."""
    case = CASES[name]
    return case.reference(x, **case.settings)


def reference_gradient(name: str, x: Logits, step: float = 1e-6) -> np.ndarray:
    """Central differences of the reference, [N, V]."""
    V = x.student.shape[-1]
    moves = step * np.eye(V)[:, None, :]
    ends = [reference(name, x._replace(student=x.student + d)) for d in (moves, -moves)]
    return ((ends[0] - ends[1]) / (2 * step)).T


def logits(seed: int = 0, *, tokens: int = 6, vocabulary: int = 32, **changes: Any) -> Logits:
    """Normal logits, as float32 numbers. Seed 0 gives those that published values are of."""
    rng = np.random.default_rng(seed)
    student, teacher = (
        rng.normal(size=(tokens, vocabulary)).astype(np.float32).astype(np.float64)
        for _ in range(2)
    )
    labels = rng.integers(0, vocabulary, tokens)
    draw = rng.integers(0, 2**32, tokens, dtype=np.uint32)
    return at(Logits(student, teacher, labels, draw, 1.0, student), **changes)


def at(x: Logits, **changes: Any) -> Logits:
    """The same with other fields; `base` follows the student."""
    x = x._replace(**changes)
    return x._replace(base=x.student)
