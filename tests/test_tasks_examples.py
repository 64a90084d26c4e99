"""Tasks from files, and the tokens that are asked for: what is given, and what is predicted."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from ddk_jax.data.sources import MultipleChoice
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.errors import DataError, UserError
from ddk_jax.places import resolve_path
from ddk_jax.tasks.examples import LastWord, Passage, Task, read_tasks
from ddk_jax.tasks.requests import choice_requests, text_requests, word_requests

FOLDER = Path(__file__).parents[1] / "tasks"
QUESTION = {"id": "q/1", "query": "Q:", "choices": ["no", "yes"], "gold": 1, "raw": {"text": 5}}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path, *rows: Any) -> Task:
    [task] = read_tasks([write(path, *rows)])
    return task


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny.write_tokenizer(tmp_path_factory.mktemp("bytes")))


def test_the_columns_say_what_kind_of_task_it_is(tmp_path: Path) -> None:
    task = read(tmp_path / "copa.validation.jsonl", QUESTION, QUESTION | {"suffix": "end"})
    assert task.name == "copa.validation"
    assert task.examples == (
        MultipleChoice("Q:", ("no", "yes"), 1, ""),
        MultipleChoice("Q:", ("no", "yes"), 1, "end"),
    )
    text = {"text": "one two three"}
    assert read(tmp_path / "lambada_x.jsonl", text).examples == (LastWord("one two", "three"),)
    assert read(tmp_path / "wiki.jsonl", text).examples == (Passage("one two three"),)


def test_folders_globs_and_compression(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("not a task")
    for name in ("b.test", "a.test"):
        line = json.dumps(QUESTION).encode()
        (tmp_path / f"{name}.jsonl.xz").write_bytes(lzma.compress(line))
    for path in (tmp_path, tmp_path / "*.jsonl.xz", tmp_path / "*"):
        assert [task.name for task in read_tasks([str(path)])] == ["a.test", "b.test"]
    with pytest.raises(DataError, match=r"README\.md: holds no task"):
        read_tasks([str(tmp_path / "README.md")])
    with pytest.raises(DataError, match="no such file"):
        read_tasks([str(tmp_path / "c.jsonl")])


def test_the_baselines_need_no_model(tmp_path: Path) -> None:
    three = {"query": "Q", "choices": ["a", "b", "c", "d"], "gold": 3}
    task = read(tmp_path / "x.jsonl", QUESTION, QUESTION, QUESTION | {"gold": 0}, three)
    assert task.baselines == {"majority": 0.5, "chance": (3 * 0.5 + 0.25) / 4}
    assert read(tmp_path / "y.jsonl", {"text": "t"}).baselines == {}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"query": "Q", "choices": ["a", "b"]}, "column 'gold' is missing"),
        (QUESTION | {"gold": 2}, "gold is 2, but the 2 choices are numbered from 0"),
        (QUESTION | {"choices": ["a"]}, "list of two texts or more, found 1 texts"),
        ({"prompt": "p", "answer": "a"}, "found 'prompt', 'answer' .tasks that a model answers"),
        ({}, "columns query, choices, gold, or text; found nothing"),
        ({"text": " "}, "text: empty or blank"),
        (["a"], "expected a JSON object, found list"),
    ],
)
def test_a_wrong_row_names_file_line_and_reason(tmp_path: Path, row: Any, reason: str) -> None:
    with pytest.raises(DataError, match=rf"x\.jsonl, line 1: .*{reason}"):
        read(tmp_path / "x.jsonl", row)


def test_every_row_is_of_the_kind_of_the_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl, line 2: column 'query' is missing"):
        read(tmp_path / "x.jsonl", QUESTION, {"text": "t"})
    with pytest.raises(DataError, match=r"x\.jsonl: holds no example"):
        read(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"lambada\.jsonl, line 1: text: needs a word, a space"):
        read(tmp_path / "lambada.jsonl", {"text": "word"})


@given(
    row=st.dictionaries(
        st.sampled_from(["query", "choices", "gold", "suffix", "text"]),
        st.none() | st.integers(-1, 3) | st.text(max_size=3) | st.lists(st.text(max_size=2)),
    )
)
def test_any_row_is_an_example_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("any") / "x.jsonl"
    try:
        task = read(path, row)
    except DataError:
        return
    assert len(task.examples) == 1


def test_a_sample_is_in_order_and_part_of_every_larger_one(tmp_path: Path) -> None:
    task = read(tmp_path / "x.jsonl", *({"text": str(i)} for i in range(50)))
    for seed in range(3):
        samples = [task.sample(limit, seed) for limit in (5, 20, 49)]
        for sample, larger in zip(samples, [*samples[1:], task], strict=True):
            places = [task.examples.index(example) for example in sample.examples]
            assert places == sorted(set(places))
            assert set(sample.examples) < set(larger.examples)
            assert (sample.available, sample.baselines) == (50, task.baselines)
    assert task.sample(5, 0).examples != task.sample(5, 1).examples
    assert task.sample(0, 0) == task.sample(50, 0) == task.sample(99, 0) == task
    with pytest.raises(UserError, match="limit of -1"):
        task.sample(-1, 0)


def test_an_option_is_predicted_after_the_query(bytes_tokenizer: Tokenizer) -> None:
    question = MultipleChoice("Is it?", ("no", "yes"), 1, "")
    [(no, yes)] = choice_requests(bytes_tokenizer, [question])
    for request, text in ((no, "Is it? no"), (yes, "Is it? yes")):
        assert bytes_tokenizer.decode(request.tokens.tolist()) == text
        assert request.start == len("Is it?")


def test_a_suffix_is_predicted_after_every_option(bytes_tokenizer: Tokenizer) -> None:
    question = MultipleChoice("I saw ", ("Al", "Beth"), 1, "run.")
    [(al, beth)] = choice_requests(bytes_tokenizer, [question])
    assert bytes_tokenizer.decode(al.tokens.tolist()) == "I saw Al run."
    assert bytes_tokenizer.decode(beth.tokens.tolist()) == "I saw Beth run."
    assert (al.start, beth.start) == (len("I saw Al"), len("I saw Beth"))


def test_last_words_and_texts(bytes_tokenizer: Tokenizer) -> None:
    [word] = word_requests(bytes_tokenizer, [LastWord("so it", "goes")])
    assert bytes_tokenizer.decode(word.tokens.tolist()) == "so it goes"
    assert word.start == len("so it")
    [text] = text_requests(bytes_tokenizer, [Passage("so it goes")])
    assert (text.tokens.size, text.start) == (len("so it goes"), 1)


def test_a_token_across_the_border_is_predicted(tmp_path: Path) -> None:
    # A tokenizer that makes one token of "t n", which begins in the query.
    vocabulary = {c: i for i, c in enumerate("it nobye")}
    vocabulary |= {"t ": 20, "t n": 21, "<eos>": 22}
    model = models.BPE(vocab=vocabulary, merges=[("t", " "), ("t ", "n")])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("!", "isolated")
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    merging = Tokenizer(tmp_path)
    [(no, bye)] = choice_requests(merging, [MultipleChoice("it", ("no", "bye"), 0, "")])
    assert no.tokens.tolist() == [vocabulary[c] for c in ("i", "t n", "o")]
    assert bye.tokens.tolist() == [vocabulary[c] for c in ("i", "t ", "b", "y", "e")]
    assert (no.start, bye.start) == (1, 1)  # both are scored from the "t" on


@pytest.mark.parametrize(
    "name", ["copa.validation", "winogrande.validation", "arc_easy.validation"]
)
def test_the_shipped_tokenizer_scores_the_tokens_that_it_trains_on(name: str) -> None:
    tokenizer = Tokenizer(resolve_path("assets:tokenizer"))
    [task] = read_tasks([str(FOLDER / f"{name}.jsonl.xz")])
    questions = [e for e in task.sample(60, 0).examples if isinstance(e, MultipleChoice)]
    for question, options in zip(questions, choice_requests(tokenizer, questions), strict=True):
        for choice, request in enumerate(options):
            context, continuation = tokenizer.encode(question.parts(choice))
            assert request.tokens.tolist() == [*context.tolist(), *continuation.tolist()]
            assert request.start == context.size


def test_the_folder_holds_what_its_readme_says() -> None:
    readme = (FOLDER / "README.md").read_text()
    files = sorted(FOLDER.glob("*.jsonl.xz"))
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 11_000_000
    licences = (FOLDER / "LICENSES.md").read_text()
    for file in files:
        name, split = file.name.split(".")[:2]
        assert f"`{name}`" in readme
        assert split in readme
        assert name in licences
    assert len(files) == 20


@pytest.mark.slow
def test_the_folder_holds_the_published_numbers_of_examples() -> None:
    found = {task.name: len(task.examples) for task in read_tasks([str(FOLDER)])}
    assert found == {
        "arc_challenge.test": 1172,
        "arc_challenge.train": 1119,
        "arc_challenge.validation": 299,
        "arc_easy.test": 2376,
        "arc_easy.train": 2251,
        "arc_easy.validation": 570,
        "boolq.train": 9427,
        "boolq.validation": 3270,
        "copa.train": 400,
        "copa.validation": 100,
        "hellaswag.train": 10_000,
        "hellaswag.validation": 10_042,
        "lambada_openai.test": 5153,
        "piqa.train": 16_113,
        "piqa.validation": 1838,
        "wikitext2_raw.test": 62,
        "winogrande.train": 40_398,
        "winogrande.validation": 1267,
        "wsc.train": 554,
        "wsc.validation": 104,
    }
