"""Scores: what they are made of, and that a model which knows the answers gets them all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ddk_jax.data.sources import MultipleChoice
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.errors import DataError
from ddk_jax.losses.targets import Head
from ddk_jax.parallel.mesh import make_mesh
from ddk_jax.tasks.examples import Examples, LastWord, Passage, Task
from ddk_jax.tasks.likelihood import Likelihood
from ddk_jax.tasks.scores import (
    TaskScore,
    choice_metrics,
    score_tasks,
    text_metrics,
    word_metrics,
)


@dataclass(frozen=True)
class Bigram:
    """A model that looks at one token: its logits are a row of a table."""

    def apply(self, params: Any, tokens: Any, segment_ids: Any, positions: Any) -> tuple[Any, None]:
        return jax.nn.one_hot(tokens, tiny.VOCABULARY), None

    def head(self, params: Any) -> Head:
        return Head(params)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny.write_tokenizer(tmp_path_factory.mktemp("bytes")))


def table(tokenizer: Tokenizer, followers: dict[str, str], gain: float = 9.0) -> np.ndarray:
    """Logits: `gain` for the byte that follows another, 0 for all else."""
    logits = np.zeros((tiny.VOCABULARY, tiny.VOCABULARY), np.float32)
    for one, other in followers.items():
        (first,), (second,) = (ids.tolist() for ids in tokenizer.encode([one, other]))
        logits[first, second] = gain
    return logits


def run(
    tokenizer: Tokenizer, logits: np.ndarray, examples: Examples, max_tokens: int = 32
) -> TaskScore:
    task = Task(name="t", examples=examples, available=len(examples), baselines={})
    [score] = score_tasks(
        Bigram(),
        jnp.asarray(logits),
        tokenizer,
        [task],
        mesh=make_mesh(devices=jax.devices()[:1]),
        max_tokens=max_tokens,
    )
    return score


def values(metrics: Any) -> dict[str, float]:
    return {name: metric.value for name, metric in metrics.items()}


def answer(*log_probs: float, greedy: bool = True) -> Likelihood:
    return Likelihood(np.array(log_probs, np.float32), np.full(len(log_probs), greedy), False)


QUESTIONS = (
    MultipleChoice("Which?", ("xa", "xb"), 1, ""),
    MultipleChoice("And which?", ("xb", "xa", "xa!"), 0, ""),
)


def test_a_model_that_knows_the_answers_has_them_all_right(tokenizer: Tokenizer) -> None:
    # After "x" comes "b", as in every right option.
    score = run(tokenizer, table(tokenizer, {"x": "b"}), QUESTIONS)
    assert values(score.metrics) == {"acc": 1.0, "acc_norm": 1.0}
    assert (score.examples, score.truncated) == (2, 0)
    assert score.predicted_tokens == 2 * 3 + 2 * 3 + 4
    assert score.context_tokens == 2 * len("Which?") + 3 * len("And which?")
    wrong = run(tokenizer, table(tokenizer, {"x": "a"}), QUESTIONS)
    assert values(wrong.metrics) == {"acc": 0.0, "acc_norm": 0.0}


def test_a_model_that_knows_the_suffixes_has_them_all_right(tokenizer: Tokenizer) -> None:
    # "l" is followed by a space: the suffix follows Al, and not Bo.
    questions = tuple(
        MultipleChoice("I saw ", names, gold, "run")
        for names, gold in ((("Al", "Bo"), 0), (("Bo", "Al"), 1))
    )
    score = run(tokenizer, table(tokenizer, {"l": " "}), questions)
    assert values(score.metrics) == {"acc": 1.0}


def test_a_model_that_knows_the_last_words_has_them_all_right(tokenizer: Tokenizer) -> None:
    followers = {" ": "a", "a": "b", "x": " "}
    words = (LastWord("x", "ab"), LastWord("x x", "ab"))
    score = run(tokenizer, table(tokenizer, followers, gain=40.0), words)
    assert values(score.metrics) == {"acc": 1.0, "perplexity": pytest.approx(1.0)}
    worse = run(tokenizer, table(tokenizer, followers), (*words, LastWord("x", "ac")))
    assert worse.metrics["acc"].value == pytest.approx(2 / 3)


def test_a_uniform_model_has_the_perplexity_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    logits = np.zeros((tiny.VOCABULARY, tiny.VOCABULARY), np.float32)
    texts = (Passage("some words here"), Passage("and " * 40))
    found = values(run(tokenizer, logits, texts).metrics)
    tokens, words, size = 14 + 159, 3 + 40, 15 + 160
    nats = tokens * math.log(tiny.VOCABULARY)
    assert found == {
        "token_perplexity": pytest.approx(tiny.VOCABULARY),
        "word_perplexity": pytest.approx(math.exp(nats / words)),
        "bits_per_byte": pytest.approx(nats / math.log(2) / size),
    }


def test_what_does_not_fit_is_cut_off_at_its_beginning_and_counted(tokenizer: Tokenizer) -> None:
    long = MultipleChoice("Which one is it? " * 5, ("xa", "xb"), 1, "")
    score = run(tokenizer, table(tokenizer, {"x": "b"}), (*QUESTIONS, long), max_tokens=16)
    assert values(score.metrics) == {"acc": 1.0, "acc_norm": 1.0}
    assert score.truncated == 1


def test_accuracy_per_byte_and_ties() -> None:
    question = MultipleChoice("Q", ("long option", "\u00e9"), 0, "")  # 11 bytes, 2 bytes
    options = [answer(-6.0, -5.0), answer(-4.0)]
    found = values(choice_metrics([question], [options]))
    assert found == {"acc": 0.0, "acc_norm": 1.0}
    tie = [answer(-4.0), answer(-4.0)]
    assert values(choice_metrics([question], [tie]))["acc"] == 1.0


def test_the_last_word_counts_if_all_its_tokens_are_right() -> None:
    half = Likelihood(np.array([-1.0, -2.0], np.float32), np.array([True, False]), False)
    metrics = word_metrics([answer(-1.0, -1.0), half])
    assert values(metrics) == {"acc": 0.5, "perplexity": pytest.approx(math.exp(2.5))}


def test_standard_errors_are_those_of_the_textbook() -> None:
    question = MultipleChoice("Q", ("a", "b"), 0, "")
    right, wrong = [answer(-1.0), answer(-2.0)], [answer(-2.0), answer(-1.0)]
    acc = choice_metrics([question] * 5, [right, right, wrong, wrong, wrong])["acc"]
    assert acc.stderr == pytest.approx(math.sqrt(0.4 * 0.6 / 4))
    assert math.isnan(choice_metrics([question], [right])["acc"].stderr)

    # Of ratios: against the spread over many draws of the same size.
    random = np.random.default_rng(0)
    draws = []
    for _ in range(400):
        sizes = random.integers(5, 40, 30)
        texts = [Passage("w " * int(n)) for n in sizes]
        answers = [answer(*random.normal(-2.0, 0.5, n) + random.normal(0, 0.3)) for n in sizes]
        draws.append(text_metrics(texts, answers))
    for name in ("token_perplexity", "word_perplexity", "bits_per_byte"):
        spread = np.std([draw[name].value for draw in draws])
        said = np.mean([draw[name].stderr for draw in draws])
        assert said == pytest.approx(spread, rel=0.1)


def test_a_broken_model_has_no_score() -> None:
    question = MultipleChoice("Q", ("a", "b"), 0, "")
    broken = [answer(math.nan), answer(-1.0)]
    assert math.isnan(choice_metrics([question], [broken])["acc"].value)
    assert math.isnan(word_metrics([answer(math.nan), answer(-1.0)])["acc"].value)


def test_an_impossible_word_has_infinite_perplexity() -> None:
    assert word_metrics([answer(-math.inf), answer(-1.0)])["perplexity"].value == math.inf


def test_an_option_without_tokens_names_the_task(tmp_path: Path, tokenizer: Tokenizer) -> None:
    unknown = Tokenizer(tiny.write_tokenizer(tmp_path))
    unknown.encode = lambda texts: [ids[:1] for ids in tokenizer.encode(texts)]  # type: ignore[method-assign]
    with pytest.raises(DataError, match="task t: the tokenizer makes no token of ' xa'"):
        run(unknown, table(tokenizer, {}), QUESTIONS)
