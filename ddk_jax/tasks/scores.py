"""Scores of a model on tasks, each with its standard error.

- Multiple choice: the model takes the option with the largest log-probability (`acc`), or with the
  largest log-probability per byte of the option (`acc_norm`; not where a suffix is predicted, which
  is the same for all options).
- Last word: `acc` counts the texts of which every token of the last word, predicted greedily, is
  right; `perplexity` is exp(-log-probability of the word), geometric mean over the texts.
- Text: `token_perplexity`, `word_perplexity` (words are what white space separates) and
  `bits_per_byte`: the nats of all predicted tokens over the tokens, words and bytes of the texts.

Standard errors are those of means and ratios over independent examples drawn from a large number of
them, carried over to perplexities to first order; NaN for a single example.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float64

from ddk_jax.data.sources import MultipleChoice
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.errors import DataError
from ddk_jax.tasks.examples import LastWord, Passage, Task
from ddk_jax.tasks.likelihood import Likelihood, Model, likelihoods
from ddk_jax.tasks.requests import Request, choice_requests, text_requests, word_requests

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What a model scored on one task."""

    task: str
    metrics: Mapping[str, Metric]
    """By name, in the order in which they are shown."""
    baselines: Mapping[str, float]
    """Accuracies that need no model (`Task.baselines`)."""
    examples: int
    """Examples that were scored."""
    available: int
    """Examples of the whole task."""
    context_tokens: int
    """Tokens that were given and not predicted, over all requests, before any truncation."""
    predicted_tokens: int
    """Tokens that the scores are made of."""
    truncated: int
    """Examples of which the beginning was left out, since the model has too few positions."""


def score_tasks(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    mesh: Mesh,
    max_tokens: int,
) -> tuple[TaskScore, ...]:
    """Score a model on tasks.

    Args:
        model: the model.
        params: its parameters, on the mesh.
        tokenizer: the model's; its ids must be below the number of the model's embeddings.
        tasks: whole, or samples.
        mesh: its data axes share the rows of a batch.
        max_tokens: longest input; longer ones lose their beginning, texts are cut into windows.

    Raises:
        DataError: the tokenizer makes nothing of an example.
    """
    found = []
    for task in tasks:
        _log.info("%s: %s examples", task.name, f"{len(task.examples):,}")
        try:
            requests = _requests(tokenizer, task)
        except DataError as error:
            raise DataError(f"task {task.name}: {error}") from error
        flat = [request for group in requests for request in group]
        results = iter(likelihoods(model, params, flat, mesh=mesh, max_tokens=max_tokens))
        answers = [[next(results) for _ in group] for group in requests]
        score = TaskScore(
            task=task.name,
            metrics=_metrics(task, answers),
            baselines=task.baselines,
            examples=len(task.examples),
            available=task.available,
            context_tokens=sum(request.start for request in flat),
            predicted_tokens=sum(answer.log_probs.size for group in answers for answer in group),
            truncated=sum(any(answer.truncated for answer in group) for group in answers),
        )
        found.append(score)
    return tuple(found)


def _requests(tokenizer: Tokenizer, task: Task) -> list[list[Request]]:
    """What is asked about every example."""
    match task.examples[0]:
        case MultipleChoice():
            return choice_requests(tokenizer, cast(Any, task.examples))
        case LastWord():
            return [[r] for r in word_requests(tokenizer, cast(Any, task.examples))]
        case Passage():
            return [[r] for r in text_requests(tokenizer, cast(Any, task.examples))]


def _metrics(task: Task, answers: Sequence[Sequence[Likelihood]]) -> dict[str, Metric]:
    match task.examples[0]:
        case MultipleChoice():
            return choice_metrics(cast(Any, task.examples), answers)
        case LastWord():
            return word_metrics([answer for (answer,) in answers])
        case Passage():
            return text_metrics(cast(Any, task.examples), [answer for (answer,) in answers])


def choice_metrics(
    examples: Sequence[MultipleChoice], answers: Sequence[Sequence[Likelihood]]
) -> dict[str, Metric]:
    """Accuracy of the most probable option; the first one of equals."""
    right, right_norm = [], []
    for example, options in zip(examples, answers, strict=True):
        scores = np.array([_total(option) for option in options])
        sizes = np.array([len(choice.encode()) for choice in example.choices])
        right.append(_outcome(scores, np.argmax(scores) == example.gold))
        right_norm.append(_outcome(scores, np.argmax(scores / sizes) == example.gold))
    metrics = {"acc": _mean(np.array(right))}
    if not any(example.suffix for example in examples):
        metrics["acc_norm"] = _mean(np.array(right_norm))
    return metrics


def word_metrics(answers: Sequence[Likelihood]) -> dict[str, Metric]:
    """Accuracy and perplexity of the last word."""
    right = [_outcome(answer.log_probs, answer.greedy.all()) for answer in answers]
    nats = _mean(-np.array([_total(answer) for answer in answers]))
    return {"acc": _mean(np.array(right)), "perplexity": _perplexity(nats)}


def text_metrics(examples: Sequence[Passage], answers: Sequence[Likelihood]) -> dict[str, Metric]:
    """Perplexities and bits per byte of whole texts."""
    nats = -np.array([_total(answer) for answer in answers])
    tokens = np.array([float(answer.log_probs.size) for answer in answers])
    words = np.array([float(len(example.text.split())) for example in examples])
    sizes = np.array([float(len(example.text.encode())) for example in examples])
    bits = _ratio(nats / math.log(2), sizes)
    return {
        "token_perplexity": _perplexity(_ratio(nats, tokens)),
        "word_perplexity": _perplexity(_ratio(nats, words)),
        "bits_per_byte": bits,
    }


def _outcome(log_probs: np.ndarray, right: np.bool) -> float:
    """1 or 0; NaN where a log-probability is NaN: such a model is not wrong, but broken."""
    return math.nan if np.any(np.isnan(log_probs)) else float(right)


def _total(answer: Likelihood) -> float:
    return float(np.sum(answer.log_probs, dtype=np.float64))


def _mean(values: Float64[np.ndarray, " n"]) -> Metric:
    return _ratio(values, np.ones(values.size))


def _ratio(totals: Float64[np.ndarray, " n"], counts: Float64[np.ndarray, " n"]) -> Metric:
    """sum(totals) / sum(counts) over independent examples; of a mean, the counts are 1."""
    size, count = totals.size, float(counts.sum())
    value = float(totals.sum()) / count if count else math.nan
    with np.errstate(invalid="ignore"):  # of an infinite total
        deviations = totals - value * counts
    variance = float(deviations @ deviations) * size / (size - 1) if size > 1 else math.nan
    return Metric(value=value, stderr=math.sqrt(variance) / count if count else math.nan)


def _perplexity(nats: Metric) -> Metric:
    with np.errstate(over="ignore"):
        value = float(np.exp(nats.value))
    return replace(nats, value=value, stderr=value * nats.stderr)
