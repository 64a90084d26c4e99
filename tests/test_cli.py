"""The command line: every command on one small run, and what it says when something is wrong.

Commands run in this process through `main`, which returns the exit code.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import ddk_jax
from ddk_jax import cli
from ddk_jax.config import Config, load_config, save_config
from ddk_jax.data.shards import read_manifest
from ddk_jax.errors import DataError, DivergedError, RunHeldError, StorageError, UserError
from ddk_jax.training.lease import RunLease

PACKAGE = Path(ddk_jax.__file__).parent


class Said(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


Ddk = Callable[..., Said]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    """Keep programs that the tests compile out of the user's cache."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "xla"))


@pytest.fixture
def ddk(capsys) -> Ddk:
    def call(*words: object) -> Said:
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def run_dir(finished, tmp_path_factory) -> Path:
    """A finished run that the commands may write into."""
    return shutil.copytree(finished.run_dir, tmp_path_factory.mktemp("cli") / "run")


@pytest.fixture(scope="session")
def exported(run_dir) -> Path:
    assert cli.main(["export", str(run_dir)]) == 0
    return run_dir / "export"


@pytest.fixture
def yaml_file(tiny_root, tmp_path) -> Path:
    save_config(tiny.config(tiny_root, tmp_path / "run"), tmp_path / "x.yaml")
    return tmp_path / "x.yaml"


# --- usage ---


def test_the_overview_lists_every_command(ddk):
    said = ddk("--help")
    assert said.code == 0
    for name, command in cli.COMMANDS.items():
        assert re.search(
            rf"^  {name} +{re.escape(command.__doc__.splitlines()[0])}$", said.out, re.M
        )


def test_version(ddk):
    assert ddk("--version") == Said(0, f"ddk_jax {ddk_jax.__version__}\n", "")


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_help_of_a_command(ddk, name):
    said = ddk(name, "--help")
    assert said.code == 0 and said.err == ""
    assert said.out.startswith(f"usage: ddk {name}")
    assert cli.COMMANDS[name].__doc__.splitlines()[0] in " ".join(said.out.split())
    assert "Args:" not in said.out


def documented_fields(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The option of every field of the config, and the words under the field."""
    module = sys.modules[kind.__module__]
    tree = ast.parse(Path(module.__file__).read_text())
    owner = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == kind.__name__)
    words = {
        field.target.id: after.value.value
        for field, after in zip(owner.body, owner.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, inner = f"{prefix}{field.name}", hints[field.name]
        if types.NoneType in typing.get_args(inner):
            inner = typing.get_args(inner)[0]
        item = typing.get_args(inner)[0] if typing.get_origin(inner) is tuple else None
        if inner == dict[str, Any]:
            continue  # the settings of a loss: for YAML only
        if dataclasses.is_dataclass(item):
            yield from documented_fields(item, f"{name}.0.")
        elif dataclasses.is_dataclass(inner):
            yield from documented_fields(inner, f"{name}.")
        else:
            yield f"--{name.replace('_', '-')}", words[field.name]


def test_help_of_train_explains_every_field_with_its_default(ddk):
    text = " ".join(re.sub("[^!-~\\s]", " ", ddk("train", "--help").out).split())
    fields = dict(documented_fields(Config))
    assert len(fields) > 60
    for option, words in fields.items():
        negated = option.replace("tied-head", "no-tied-head")
        assert option in text or negated in text, option
        assert " ".join(words.split()) in text, option
    assert text.count("(default:") >= len(fields)
    assert "--optim.learning-rate FLOAT Peak learning rate. (default: 3e-05)" in text


def test_overrides_are_typed_and_change_only_what_they_name(yaml_file):
    words = ["--optim.learning-rate", "3e-4", "--train.steps=7", "--objective.terms.1.weight", "2"]
    words += ["--student.spec.no-tied-head", "--run.compute-dtype", "bfloat16"]
    config = cli.parse("train", [str(yaml_file), *words]).keywords["config"]
    before = load_config(yaml_file)
    first, second = before.objective.terms
    terms = (first, dataclasses.replace(second, weight=2.0))
    spec = dataclasses.replace(before.student.spec, tied_head=False)
    assert config == dataclasses.replace(
        before,
        optim=dataclasses.replace(before.optim, learning_rate=3e-4),
        train=dataclasses.replace(before.train, steps=7),
        objective=dataclasses.replace(before.objective, terms=terms),
        student=dataclasses.replace(before.student, spec=spec),
        run=dataclasses.replace(before.run, compute_dtype="bfloat16"),
    )
    assert cli.parse("train", [str(yaml_file)]).keywords["config"] == before


def test_settings_of_the_controller_are_overridden_like_fields(yaml_file):
    words = ["--mixture.alpha", "0.3", "--mixture.gap=ppl_ratio", "--mixture.interval-steps", "7"]
    config = cli.parse("train", [str(yaml_file), *words]).keywords["config"]
    assert config.mixture.settings == {"gap": "ppl_ratio", "alpha": 0.3}
    assert config.mixture.interval_steps == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a command"),
        (["trian"], "unknown command trian: did you mean train?"),
        (["--verbose"], "unknown command --verbose"),
        (["train"], "name the YAML file before any option"),
        (["train", "--train.steps", "3", "x.yaml"], "name the YAML file before any option"),
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["train", "{yaml}", "--train.stepz", "3"], "--train.steps INT"),
        (["train", "{yaml}", "--train.steps", "many"], "--train.steps"),
        (["train", "{yaml}", "--run.compute-dtype", "float16"], "float16"),
        (["train", "{yaml}", "--optim.warmup-steps", "99"], "optim.warmup_steps = 99 is longer"),
        (
            ["train", "{yaml}", "--student.spec.num-heads", "3"],
            "hidden_size = 16 is not a multiple",
        ),
        (["train", "{yaml}", "--objective.terms.0.loss", "forward_kl"], "two terms have one"),
        (["train", "{yaml}", "--objective.terms.1.loss", "kl"], "unknown loss 'kl'"),
        (["train", "{yaml}", "--mixture.gap", "ratio"], "mixture.gap"),
        (["train", "{yaml}", "--mixture.alhpa", "1"], "'alhpa': did you mean alpha?"),
        (["train", "{yaml}", "--mixture.alpha"], "--mixture.alpha: needs a value"),
        (["train", "{yaml}", "--mixture.alpha", "["], "mixture.alpha: needs float, got '['"),
        (["doctor", "nowhere.yaml"], "nowhere.yaml"),
        (["evaluate"], "MODEL"),
        (["evaluate", "{root}/teacher"], "name prepared data with --data"),
        (["evaluate", "{root}/teacher", "--data", "{root}/data", "--seq-len", "17"], "at most 16"),
        (["evaluate", "{root}/nowhere", "--data", "{root}/data"], "no such directory"),
        (["evaluate", "{root}/teacher", "--data", "{root}/data", "--tasks", "x"], "one of them"),
        (["evaluate", "{root}/teacher", "--data", "{root}/data", "--limit", "5"], "is for --tasks"),
        (["export", "{root}/data"], "not a run directory"),
        (["report"], "at least one run"),
        (["report", "{root}/data"], "not a run directory"),
        (["report", "{root}/a", "{root}/b"], "--out"),
        (["generate", "{root}/teacher"], "at least one prompt"),
        (["generate", "{root}/teacher", "a", "--temperature", "-1"], "temperature = -1.0"),
        (["inspect", "{root}/nowhere"], "no such directory"),
        (["inspect", "{root}"], "neither a run"),
        (["prune", "{root}/teacher"], "--data"),
        (
            ["prune", "{root}/teacher", "--data", "{root}/data", "--out", "x", "--layers", "3"],
            "3 layers cannot be left: the model has 2",
        ),
        (["advise"], "name a student or a teacher"),
        (["advise", "--student", "{root}/nowhere"], "no such directory"),
        (["quickstart", "--steps", "few"], "--steps"),
    ],
)
def test_wrong_usage_is_said_and_exits_with_64(ddk, tiny_root, yaml_file, words, message):
    said = ddk(*(word.format(yaml=yaml_file, root=tiny_root) for word in words))
    assert said.code == 64 and said.out == ""
    plain = " ".join(re.sub("[^!-~\\s]", " ", said.err).split())
    assert message in plain, said.err
    assert "Traceback" not in said.err
    if "ddk: error:" in said.err:
        assert said.err.rstrip("\n").rpartition("\n")[2].startswith("ddk: error: ")


# --- exit codes and what reaches the terminal ---


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("wrong\n  in two lines"), 64, "ddk: error: wrong in two lines\n"),
        (DataError("data"), 65, "ddk: error: data\n"),
        (DivergedError("nan"), 70, "ddk: error: nan\n"),
        (StorageError("disk"), 74, "ddk: error: disk\n"),
        (RunHeldError("held"), 75, "ddk: error: held\n"),
        (PermissionError(13, "Permission denied", "/x"), 74, "ddk: error: [Errno 13] Permission"),
        (KeyboardInterrupt(), 130, "ddk: interrupted\n"),
    ],
)
def test_exit_codes(ddk, monkeypatch, error, code, line):
    def fail(path: str = "") -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "inspect", fail)
    said = ddk("inspect")
    assert said.code == code and said.out == "" and said.err.startswith(line)


def test_a_bug_is_not_dressed_up(ddk, monkeypatch):
    def fail(path: str = "") -> None:
        raise ValueError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "inspect", fail)
    with pytest.raises(ValueError, match="a bug"):
        ddk("inspect")


def test_what_is_logged_and_what_is_not(ddk, monkeypatch):
    logger = logging.getLogger("ddk_jax")
    before = (list(logger.handlers), logger.level, logger.propagate)

    def speak(path: str = "") -> None:
        logging.getLogger("ddk_jax.somewhere").info("%d steps", 3)
        logging.getLogger("ddk_jax.somewhere").debug("too much")
        logging.getLogger("ddk_jax").warning("look out")
        logging.getLogger("absl").info("chatter")
        logging.getLogger("orbax.checkpoint").info("chatter")
        warnings.warn("for programmers", DeprecationWarning, stacklevel=1)

    monkeypatch.setitem(cli.COMMANDS, "inspect", speak)
    assert ddk("inspect") == Said(0, "", "3 steps\nwarning: look out\n")
    assert (logger.handlers, logger.level, logger.propagate) == before


def test_no_prepared_data_is_65(ddk, yaml_file, tmp_path):
    said = ddk("train", yaml_file, "--data.dir", tmp_path / "nowhere")
    assert said.code == 65 and "run ddk prepare" in said.err


def test_a_held_run_is_75(ddk, yaml_file, tmp_path):
    with RunLease(tmp_path / "run"):
        said = ddk("train", yaml_file)
    assert said.code == 75 and f"process {os.getpid()}" in said.err


def test_a_run_directory_that_cannot_be_made_is_74(ddk, yaml_file, tmp_path):
    (tmp_path / "file").write_text("")
    said = ddk("train", yaml_file, "--run.dir", tmp_path / "file" / "run")
    assert said.code == 74 and said.err.startswith("ddk: error: ")


# --- the commands ---


def test_prepare_writes_the_data_once(ddk, yaml_file, tmp_path):
    said = ddk("prepare", yaml_file, "--data.dir", tmp_path / "data")
    assert said.code == 0 and said.out == "" and f"wrote {tmp_path / 'data'}" in said.err
    assert read_manifest(tmp_path / "data").names == tiny.DOMAINS
    assert "is up to date" in ddk("prepare", yaml_file, "--data.dir", tmp_path / "data").err


def test_train_shows_the_table_and_the_next_commands(ddk, run_dir, finished):
    """The run is finished already: the same command shows what is there."""
    copy = run_dir.parent / "again"
    shutil.copytree(finished.run_dir, copy)
    said = ddk("train", finished.run_dir / "config.yaml", "--run.dir", copy)
    assert said.code == 0, said.err
    for name in (*tiny.DOMAINS, "ppl before", "teacher ppl", f"ddk report {copy}", "ddk export"):
        assert name in said.out
    assert "event=resume step=12" in said.err


def test_a_preempted_run_says_how_to_continue(ddk, yaml_file, tmp_path, monkeypatch, finished):
    from ddk_jax.training import loop

    summary = dataclasses.replace(finished.summary, stop_reason="preempted", steps=5)
    monkeypatch.setattr(loop, "train", lambda config: summary)
    said = ddk("train", yaml_file)
    assert said.code == 0
    assert "saved at step 5" in said.out and f"ddk train {tmp_path}/run/config.yaml" in said.out


def test_evaluate_a_run_gives_what_the_run_measured(ddk, run_dir, finished):
    said = ddk("evaluate", run_dir, "--rows", 8, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    keys = ["model", "data", "domains", "nats", "bits_per_byte", "perplexity", "tokens"]
    assert list(found) == keys
    assert found["model"] == str(run_dir) and found["domains"] == list(tiny.DOMAINS)
    np.testing.assert_allclose(found["nats"], finished.summary.student_nats_after, rtol=1e-4)
    assert found["tokens"] == finished.of("evaluation")[-1]["tokens"]
    np.testing.assert_allclose(found["perplexity"], np.exp(found["nats"]))
    for domain, nats, bits in zip(
        read_manifest(Path(found["data"])).domains,
        found["nats"],
        found["bits_per_byte"],
        strict=True,
    ):
        # One token a byte, and the end token of each document.
        tokens, size = domain.validation.tokens, domain.validation.bytes
        assert tokens == size + domain.validation.documents
        assert bits == pytest.approx(nats / math.log(2) * tokens / size)


def test_evaluate_prints_a_table(ddk, exported, tiny_root):
    said = ddk("evaluate", exported, "--data", tiny_root / "data", "--rows", 8)
    lines = said.out.splitlines()
    assert said.code == 0 and lines[0].split()[:3] == ["domain", "nats/token", "bits/byte"]
    assert [line.split()[0] for line in lines[2:]] == [*tiny.DOMAINS, "mean"]


@pytest.mark.slow
def test_evaluate_compares_with_a_teacher(ddk, run_dir, finished, tiny_root):
    teacher = tiny_root / "teacher"
    options = ["--teacher", teacher, "--rows", 8]
    found = json.loads(ddk("evaluate", run_dir, *options, "--json").out)
    assert found["tokens"] == finished.of("evaluation")[-1]["tokens"]
    line = finished.of("evaluation")[-1]
    terms = found["terms"]
    np.testing.assert_allclose(terms["cross_entropy"], line["student_nats"], rtol=1e-4)
    np.testing.assert_allclose(terms["teacher_cross_entropy"], line["teacher_nats"], rtol=1e-4)
    assert min(terms["forward_kl"]) > 0 and 0 < max(terms["top_k_overlap"]) < 1

    options += ["--data", tiny_root / "data", "--seq-len", tiny.SEQ_LEN]
    same = json.loads(ddk("evaluate", teacher, *options, "--json").out)["terms"]
    np.testing.assert_allclose(same["forward_kl"], 0, atol=1e-6)
    np.testing.assert_array_equal(same["top_k_overlap"], 1)
    table = ddk("evaluate", teacher, *options, "--roles", "response").out.splitlines()
    assert table[0].split() == ["domain", "nats", "teacher's", "KL", "overlap@8", "tokens"]
    assert table[2].split()[1:] == ["-", "-", "-", "-", "0"]  # plain text has no responses


def test_evaluate_scores_tasks(ddk, run_dir, exported, tmp_path):
    rows = [
        {"query": "a cat", "choices": ["runs", "zzz", "jumps"], "gold": i % 3} for i in range(7)
    ]
    (tmp_path / "cats.test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "lambada.jsonl").write_text(json.dumps({"text": "the dog runs over the cat"}))
    words = ["--tasks", tmp_path / "*.jsonl", "--limit", 5]
    said = ddk("evaluate", run_dir, *words, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert list(found) == ["model", "tasks"] and found["model"] == str(run_dir)
    cats, last_word = found["tasks"]
    assert (cats["task"], cats["examples"], cats["available"]) == ("cats.test", 5, 7)
    assert cats["baselines"] == {"majority": pytest.approx(3 / 7), "chance": pytest.approx(1 / 3)}
    assert last_word["metrics"]["perplexity"]["value"] > 1
    assert last_word["metrics"]["perplexity"]["stderr"] is None  # of one example
    assert last_word["truncated"] == 1

    header, _, acc, acc_norm, *others = ddk("evaluate", exported, *words).out.splitlines()
    assert header.split()[:4] == ["task", "examples", "metric", "value"]
    value = format(cats["metrics"]["acc"]["value"], ".4f")
    assert acc.split()[:4] == ["cats.test", "5/7", "acc", value]
    assert acc.split()[-3:] == ["0.4286", "0.3333", "0"]
    assert acc_norm.split()[0] == "acc_norm"
    assert [line.split()[0] for line in others] == ["lambada", "perplexity"]


def test_evaluate_a_file_that_is_no_task_is_65(ddk, exported, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "p", "answer": "a"}')
    said = ddk("evaluate", exported, "--tasks", tmp_path / "x.jsonl")
    assert said.code == 65 and "x.jsonl, line 1: a task has the columns query" in said.err


def test_evaluate_refuses_another_tokenizer(ddk, tiny_root, tmp_path):
    tokenizer = tiny.write_tokenizer(tmp_path / "tokenizer", swapped=True)
    teacher = tiny.write_teacher(tmp_path / "teacher", tokenizer)
    said = ddk("evaluate", teacher, "--data", tiny_root / "data")
    assert said.code == 64 and "different tokenizers: token" in said.err


def test_the_exported_student_is_the_run_s(ddk, run_dir, exported, tiny_root):
    options = ["--data", tiny_root / "data", "--rows", 8, "--seq-len", tiny.SEQ_LEN, "--json"]
    ours, theirs = (json.loads(ddk("evaluate", x, *options).out) for x in (run_dir, exported))
    np.testing.assert_allclose(ours["nats"], theirs["nats"], rtol=1e-6)
    for name in ("tokenizer.json", "config.json", "generation_config.json", "SHA256SUMS"):
        assert (exported / name).is_file()


def test_the_model_card(exported, finished, tiny_root):
    card = (exported / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "library_name: transformers" in front and "pipeline_tag: text-generation" in front
    assert card.isascii()
    assert "# Student of teacher" in card and "random values" in card
    assert f"{finished.summary.tokens:,} tokens in {tiny.STEPS} steps" in card
    assert f"config digest `{finished.config.digest()}`" in card
    for name in tiny.DOMAINS:
        assert f"| {name} |" in card and f"{name}.jsonl | not stated |" in card
    assert "](mixture.png)" in card and (exported / "mixture.png").is_file()
    assert " mixture.png\n" in (exported / "SHA256SUMS").read_text()
    # A card is published: it does not tell where things were.
    assert str(tiny_root) not in card and str(finished.run_dir) not in card


def test_export_elsewhere_in_bfloat16_and_again(ddk, run_dir, exported, tmp_path):
    for _ in range(2):
        said = ddk("export", run_dir, tmp_path / "out", "--dtype", "bfloat16")
        assert said.code == 0 and said.out == f"{tmp_path / 'out'}\n"
    full, half = (load_file(x / "model.safetensors") for x in (exported, tmp_path / "out"))
    assert full.keys() == half.keys()
    for name, values in half.items():
        assert values.dtype.name == "bfloat16"
        np.testing.assert_array_equal(values, full[name].astype(values.dtype))


def test_export_overwrites_nothing_else(ddk, run_dir, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    said = ddk("export", run_dir, tmp_path)
    assert said.code == 64 and "choose another place" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_export_without_a_checkpoint(ddk, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    said = ddk("export", tmp_path / "run")
    assert said.code == 64 and "not saved a checkpoint yet" in said.err


@pytest.mark.slow
def test_reading_a_run_leaves_its_checkpoints_alone(ddk, run_dir):
    before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert ddk("generate", run_dir, "the cat", "--max-new-tokens", 2).code == 0
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == before


@pytest.mark.slow
def test_report_of_one_run_and_of_two(ddk, run_dir, finished, tmp_path):
    assert ddk("report", run_dir).out == f"{run_dir / 'report' / 'report.html'}\n"
    said = ddk("report", run_dir, finished.run_dir, "--out", tmp_path)
    assert said.code == 0 and "Comparison of 2 runs" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_generate_continues_each_prompt_the_same_way_again(ddk, run_dir, exported):
    options = ["--max-new-tokens", 5, "--temperature", 0]
    said = ddk("generate", run_dir, "the cat", "12", *options)
    assert said.code == 0, said.err
    first, second = said.out.rstrip("\n").split("\n\n")
    assert first.startswith("the cat") and second.startswith("12")
    assert ddk("generate", exported, "the cat", "12", *options).out == said.out
    drawn = [ddk("generate", exported, "the cat", *options[:2], "--seed", 1).out for _ in range(2)]
    assert drawn[0] == drawn[1] != ""


@pytest.mark.slow
def test_generate_reads_prompts_from_a_file_and_answers(ddk, exported, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("the cat\n\n12\n")
    options = ["--max-new-tokens", 5, "--temperature", 0]
    said = ddk("generate", exported, "--prompts", lines, *options)
    assert said.out == ddk("generate", exported, "the cat", "12", *options).out != ""
    said = ddk("generate", exported, "a", "--chat", *options)
    assert said.code == 65 and "no chat template" in said.err
    said = ddk("generate", exported, "a", "--stop", "ab", *options)
    assert said.code == 64 and "'ab' is 2 tokens" in said.err
    narrow = ddk("generate", exported, "a", "--top-p", "1e-6", "--temperature", 9, *options[:2])
    assert narrow.out == ddk("generate", exported, "a", *options).out
    copied = shutil.copytree(exported, tmp_path / "model")
    (copied / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{{ messages[1].content }}"
    )
    answer = ddk("generate", copied, "the cat", "--chat", *options)
    assert answer.code == 0 and ddk("generate", exported, "the cat", *options).out == (
        f"the cat{answer.out}"
    )


def test_inspect_a_run(ddk, run_dir, finished):
    said = ddk("inspect", run_dir)
    assert said.code == 0
    for words in ("finished (steps)", "12 steps", "8, 12", finished.config.digest(), "jax 0."):
        assert words in said.out
    assert all(name in said.out for name in tiny.DOMAINS)


def test_inspect_a_run_that_has_hardly_begun(ddk, run_dir, tmp_path):
    shutil.copyfile(run_dir / "config.yaml", tmp_path / "config.yaml")
    said = ddk("inspect", tmp_path)
    assert said.code == 0
    assert "not finished" in said.out and "none yet" in said.out and "no evaluation yet" in said.out


def test_inspect_data(ddk, tiny_root, tmp_path):
    said = ddk("inspect", tiny_root / "data")
    assert said.code == 0 and "257 tokens" in said.out and "licence not stated" in said.out
    assert re.search(r"^words +\d+ ", said.out, re.M) and re.search(r"^total ", said.out, re.M)
    shutil.copytree(tiny_root / "data", tmp_path / "data")
    (tmp_path / "data" / "words" / "train-00000-of-00001.offsets.npy").write_bytes(b"")
    said = ddk("inspect", tmp_path / "data")
    assert said.code == 65 and "train-00000-of-00001.offsets.npy" in said.err


def test_inspect_a_model(ddk, tiny_root):
    said = ddk("inspect", tiny_root / "teacher")
    assert said.code == 0
    for words in ("llama", "14,352", "2 of width 24", "257, head tied", "float32", "<|endoftext|>"):
        assert words in said.out


def test_inspect_finds_what_the_package_ships(ddk):
    assert ddk("inspect", "assets:corpus").code == 64  # text, neither data nor model


@pytest.mark.slow
def test_prune_writes_a_student_and_says_what_is_left(ddk, tiny_root, tmp_path):
    options = ["--data", tiny_root / "data", "--out", tmp_path / "s", "--layers", 1, "--ffn", 20]
    said = ddk("prune", tiny_root / "teacher", *options, "--method", "first", "--rows", 2)
    assert said.code == 0, said.err
    assert re.search(r"^inner width of an MLP +32 +20$", said.out, re.M)
    assert "layers of the teacher: 0\n" in said.out and said.out.endswith(f"{tmp_path / 's'}\n")
    assert re.search(r"^words( +\d\.\d{4}){2}$", said.out, re.M)
    assert "1 of width 24, feed-forward 20" in ddk("inspect", tmp_path / "s").out


def test_advise_by_size_by_directory_and_by_config(ddk, tiny_root, yaml_file):
    words = ["--student", "1.8B", "--tokens", "15B", "--teacher", "7B", "70B"]
    said = ddk("advise", *words)
    assert said.code == 0, said.err
    assert "4.48 B" in said.out and "warning: 70B: past 5 x" in said.out
    tree = json.loads(ddk("advise", *words, "--teacher-nats", 2.0, 1.8, "--json").out)
    keys = ["student", "best_teacher", "extrapolated", "outlook", "candidates"]
    assert list(tree) == keys and tree["best_teacher"] == pytest.approx(4484.902e6)
    assert [c["prediction"]["teacher_nats"] for c in tree["candidates"]] == [2.0, 1.8]
    said = ddk("advise", "--teacher", tiny_root / "teacher")
    assert said.code == 0 and "14.4 k" in said.out
    said = ddk("advise", yaml_file)
    assert said.code == 0 and "student.spec" in said.out and str(tiny_root / "teacher") in said.out


def test_doctor_says_ok(ddk, yaml_file):
    said = ddk("doctor", yaml_file, "--json", "--evaluation.batch-rows", 16)
    assert said.code == 0, said.out
    tree = json.loads(said.out)
    assert list(tree) == ["ok", "checks"] and tree["ok"] is True
    for check in tree["checks"]:
        assert list(check) == ["name", "ok", "value", "advice"] and check["ok"] is True


def test_doctor_says_what_is_wrong(ddk, yaml_file, tmp_path):
    options = [yaml_file, "--data.dir", tmp_path / "nowhere"]
    said = ddk("doctor", *options, "--json")
    tree = json.loads(said.out)
    wrong = [check["name"] for check in tree["checks"] if not check["ok"]]
    assert said.code == 64 and tree["ok"] is False and "data" in wrong
    said = ddk("doctor", *options)
    assert said.code == 64 and "BAD  data: " in said.out and "ok   versions: " in said.out
    assert said.err.startswith("ddk: error: not fit for a run: data")


def test_doctor_without_a_config(ddk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = ddk("doctor")
    assert said.code == 0 and "devices: 8 x cpu" in said.out and "settings" not in said.out


def test_quickstart_passes_its_options_on(ddk, monkeypatch, tmp_path):
    from ddk_jax import quickstart

    calls: list[Any] = []
    monkeypatch.setattr(quickstart, "run", lambda *args, **kwargs: calls.append((args, kwargs)))
    assert ddk("quickstart", "--dir", tmp_path, "--steps", 4, "--seed", 2).code == 0
    assert ddk("quickstart").code == 0
    assert calls == [
        ((tmp_path,), {"steps": 4, "seed": 2}),
        ((Path("runs/quickstart"),), {"steps": None, "seed": 0}),
    ]


# --- real processes ---


def environment(tmp_path: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    return kept | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": path}


@pytest.mark.slow
def test_help_imports_nothing_heavy(tmp_path):
    program = (
        "import sys; from ddk_jax.cli import main; main(['--help']); main(['train', '--help'])\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'grain', 'transformers', 'matplotlib'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_terminated_run_saves_says_so_and_continues(tiny_root, tmp_path):
    """`python -m ddk_jax`, as a job scheduler sees it."""
    config = tiny.config(
        tiny_root, tmp_path / "run", **{"train.steps": 2000, "checkpoint.every_steps": 0}
    )
    save_config(config, tmp_path / "x.yaml")
    command = [sys.executable, "-m", "ddk_jax", "train", str(tmp_path / "x.yaml")]
    process = subprocess.Popen(
        command,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2/2000"):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert f"ddk train {tmp_path}/run/config.yaml" in out
    step = int(re.search(r"saved at step (\d+)", out)[1])
    assert "Traceback" not in err and "Warning" not in err
    assert any((tmp_path / "cache" / "ddk_jax" / "xla").iterdir())
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    again = [*command[:-1], str(tmp_path / "run" / "config.yaml"), "--train.max-tokens", "1"]
    done = subprocess.run(again, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0 and f"event=resume step={step}" in done.stderr, done.stderr
