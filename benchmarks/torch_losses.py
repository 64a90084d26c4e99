"""The losses as one writes them in torch: float32, eager, all logits at once.

What `losses.py` compares with, at temperature 1 and the default settings. Nothing is divided by a
temperature here, which would be one more array of the logits' size.

Legend: N tokens, V vocabulary, k leading entries; p is the teacher's softmax, q the student's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

NatsOf: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Student's logits [N, V], teacher's logits [N, V] and labels [N] to nats [N]."""


def cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """-log q[label]."""
    return F.cross_entropy(student, labels, reduction="none")


def forward_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(p, q)."""
    return kl(*log_probs(teacher, student))


def reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(q, p)."""
    return kl(*log_probs(student, teacher))


def generalised_jsd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Mean of the KLs to the mixture in equal parts."""
    log_p, log_q = log_probs(teacher, student)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def skew_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(p, 0.1 p + 0.9 q)."""
    log_p, log_q = log_probs(teacher, student)
    return kl(log_p, torch.logaddexp(log_p + math.log(0.1), log_q + math.log(0.9)))


def skew_reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(q, 0.9 p + 0.1 q)."""
    log_p, log_q = log_probs(teacher, student)
    return kl(log_q, torch.logaddexp(log_p + math.log(0.9), log_q + math.log(0.1)))


def symmetric_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Mean of both KLs."""
    log_p, log_q = log_probs(teacher, student)
    return (kl(log_p, log_q) + kl(log_q, log_p)) / 2


def total_variation(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Half of the sum of |p - q|."""
    return (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1) / 2


def spherical_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL of logits that are standardised to the teacher's standard deviation."""
    deviation = teacher.std(-1, correction=0, keepdim=True)
    standard = (student - student.mean(-1, keepdim=True)) / student.std(
        -1, correction=0, keepdim=True
    )
    return kl(*log_probs(teacher, standard * deviation))


def adaptive_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Both KLs, weighted by the head's and the tail's share of what is missed; the head holds 0.5.

    The ranking is a full sort.
    """
    log_p, log_q = log_probs(teacher, student)
    with torch.no_grad():
        p, ids = log_p.exp().sort(-1, descending=True)
        in_head = p.cumsum(-1) <= 0.5
        in_head[:, 0] = True
        gap = (p - log_q.exp().gather(-1, ids)).abs()
        w = (gap * in_head).sum(-1) / gap.sum(-1)
    return w * kl(log_p, log_q) + (1 - w) * kl(log_q, log_p)


def uld(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Sum of the differences between sorted probabilities."""
    p, q = (z.softmax(-1).sort(-1, descending=True).values for z in (teacher, student))
    return (p - q).abs().sum(-1)


def bild(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL of softmaxed differences of 8 leading logits, the teacher's and the student's in turn."""

    def log_shares(logits: Tensor, ids: Tensor) -> Tensor:
        values = logits.gather(-1, ids)
        first, second = torch.triu_indices(8, 8, offset=1)
        return F.log_softmax(values[:, first] - values[:, second], dim=-1)

    chosen = [leader.topk(8).indices for leader in (teacher, student)]
    each = [kl(log_shares(teacher, ids), log_shares(student, ids)) for ids in chosen]
    return each[0] + each[1]


def top_k_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL over the teacher's 64 most probable entries, and one bucket for all others."""
    log_p, log_q = log_probs(teacher, student)
    log_p, ids = log_p.topk(64)
    return kl(*(with_bucket(x) for x in (log_p, log_q.gather(-1, ids))))


def top_p_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL over the fewest entries that hold 0.9, and one bucket for all others."""
    log_p, log_q = log_probs(teacher, student)
    log_p, ids = log_p.sort(-1, descending=True)
    log_q = log_q.gather(-1, ids)
    p = log_p.exp()
    kept = p.cumsum(-1) - p < 0.9
    head = (kept * p * (log_p - log_q)).sum(-1)
    tail_p, tail_q = (x.masked_fill(kept, -math.inf).logsumexp(-1) for x in (log_p, log_q))
    return head + tail_p.exp() * (tail_p - tail_q)


def bounded_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL, renormalised, over the label and the entries with p of at least 1e-4."""
    kept = (teacher.softmax(-1) >= 1e-4).scatter(-1, labels[:, None], True)
    nothing = torch.finfo(torch.float32).min
    return kl(*log_probs(*(z.masked_fill(~kept, nothing) for z in (teacher, student))))


LOSSES: dict[str, NatsOf] = {
    function.__name__: function
    for function in (
        cross_entropy,
        forward_kl,
        reverse_kl,
        generalised_jsd,
        skew_kl,
        skew_reverse_kl,
        symmetric_kl,
        total_variation,
        spherical_kl,
        adaptive_kl,
        uld,
        bild,
        top_k_kl,
        top_p_kl,
        bounded_kl,
    )
}
"""By our names. Not the sampled ones: torch draws other entries, so nothing could be checked."""


# What the losses are made of


def log_probs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both."""
    return F.log_softmax(first, dim=-1), F.log_softmax(second, dim=-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a, b) over the last axis; torch names the second one first."""
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def with_bucket(log_probs: Tensor) -> Tensor:
    """[N, k + 1]: the last entry is the rest of the mass."""
    rest = torch.log1p(-log_probs.exp().sum(-1, keepdim=True))
    return torch.cat([log_probs, rest], dim=-1)
