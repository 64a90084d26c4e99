"""`ddk quickstart`: the whole job on what the package ships, in a few minutes on two CPU cores.

Tokenise and shard ten domains, measure the shipped teacher, distil a student from random values
with DDK's mixture, export it, and write a report: the same calls that a user's own run makes.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax

from ddk_jax.analysis.report import domain_table, write_report
from ddk_jax.analysis.runs import load_run
from ddk_jax.config import Config, load_config
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.models import hf
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.sampling import Sampling
from ddk_jax.places import resolve_path
from ddk_jax.samples import continued_texts, stop_tokens
from ddk_jax.training.corpus import prepare_corpus
from ddk_jax.training.export import export_run
from ddk_jax.training.loop import RunSummary, train

_log = logging.getLogger(__name__)

PROMPT = "To the Senate and House of Representatives:\n\nI have the honor to"
SAMPLE_TOKENS = 48


class Quickstart(NamedTuple):
    """What the quickstart made."""

    summary: RunSummary
    table: str
    """Per domain: perplexities before and after, the teacher's, ratio, weight, share of tokens."""
    run: Path
    export: Path
    """Model directory of the student, for transformers and `ddk generate`."""
    report: Path
    """One HTML page."""


def quickstart_config(directory: Path, *, steps: int | None = None, seed: int = 0) -> Config:
    """The shipped config, with its data and its run under `directory`."""
    config = load_config(resolve_path("assets:quickstart.yaml"))
    length = config.train.steps if steps is None else steps
    warmup = min(config.optim.warmup_steps, length)
    return replace(
        config,
        run=replace(config.run, dir=str(directory / "run"), seed=seed),
        data=replace(config.data, dir=str(directory / "data")),
        train=replace(config.train, steps=length),
        optim=replace(config.optim, warmup_steps=warmup),
    )


def run(directory: Path, *, steps: int | None = None, seed: int = 0) -> Quickstart | None:
    """Do it all and print what came out. A second call continues, or shows, what is there.

    Args:
      directory: where everything goes.
      steps: length of the run; default: that of the shipped config.
      seed: of the student and of the data order.

    Returns:
      What was made; None when the run was told to stop (SIGTERM) and saved itself.
    """
    config = quickstart_config(directory, steps=steps, seed=seed)
    print("1/4  preparing ten domains of text")
    prepare_corpus(config, progress=_log.info)
    print(f"2/4  distilling ({config.train.steps} steps)")
    summary = train(config)
    if summary.stop_reason == "preempted":
        print("stopped and saved; the same command continues")
        return None
    print("3/4  exporting the student")
    export = export_run(Path(config.run.dir), directory / "student", dtype="float32")
    print("4/4  writing the report")
    report = write_report([Path(config.run.dir)], directory / "report")
    table = domain_table(load_run(Path(config.run.dir)))
    print(f"\n{table}\n")
    _print_samples({"teacher": resolve_path(config.teacher.path), "student": export})
    print(f"\nrun      {config.run.dir}\nstudent  {export}\nreport   {report}")
    return Quickstart(summary, table, Path(config.run.dir), export, report)


def _print_samples(models: dict[str, Path]) -> None:
    """The same prompt, continued by each model."""
    for name, directory in models.items():
        spec = hf.read_spec(directory)
        tokenizer = Tokenizer(directory)
        sampling = Sampling(
            max_new_tokens=SAMPLE_TOKENS, temperature=0.7, top_k=40, stop=stop_tokens(tokenizer)
        )
        model = Decoder(spec=spec), hf.load(directory, spec=spec)
        (text,) = continued_texts(*model, tokenizer, [PROMPT], sampling, key=jax.random.key(0))
        print(f'{name}: "{" ".join((PROMPT + text).split())}"')
