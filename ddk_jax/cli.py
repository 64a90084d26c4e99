"""The command line: `ddk COMMAND ...`, which is also `python -m ddk_jax`.

A command is a function below; its parameters are its options. `prepare`, `train`, `plan` and
`doctor` take a YAML file, and overrides of its fields: `ddk train x.yaml --train.steps 100`.

Exit codes: 0 done, or stopped and saved; 3 the plan does not fit; 64 usage or config; 65 data;
70 diverged; 74 input or output; 75 another process holds the run; 130 interrupted.
"""

from __future__ import annotations

import json as json_format
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from ddk_jax import __version__
from ddk_jax.arguments import bound
from ddk_jax.config import Config
from ddk_jax.console import console
from ddk_jax.errors import StorageError, UserError
from ddk_jax.plain import suggest

_log = logging.getLogger(__name__)

Settings = Annotated[Config, arg(name="")]
"""The config as options without a prefix."""
Model = Annotated[Positional[str], arg(metavar="MODEL")]
Flag = Annotated[bool, FlagCreatePairsOff]


def quickstart(
    dir: Path = Path("runs/quickstart"), steps: int | None = None, seed: int = 0
) -> None:
    """Distil a student from the shipped teacher, from text to report, in a few minutes.

    Args:
      dir: where everything goes; a second call continues what is there.
      steps: length of the run; default: that of the shipped config.
      seed: of the student and of the data order.
    """
    from ddk_jax.quickstart import run

    run(dir, steps=steps, seed=seed)


def prepare(config: Settings, workers: int = 0) -> None:
    """Tokenise the config's sources into shards for training, once.

    Args:
      config: its data part is what counts.
      workers: processes, which change nothing about the result; 0: one for each core.
    """
    from ddk_jax.training.corpus import prepare_corpus

    prepare_corpus(config, progress=_log.info, workers=workers)


def train(config: Settings) -> None:
    """Distil a student as the config says, or continue the run in its run.dir."""
    from ddk_jax.analysis.runs import load_run
    from ddk_jax.analysis.tables import domain_table
    from ddk_jax.parallel.processes import is_first
    from ddk_jax.places import resolve_place
    from ddk_jax.training.loop import train as run

    summary = run(config)
    if not is_first():
        return
    run_dir = resolve_place(config.run.dir)
    if summary.stop_reason == "preempted":
        print(f"stopped and saved at step {summary.steps}; to continue:")
        print(f"  ddk train {run_dir / 'config.yaml'}")
    else:
        print(domain_table(load_run(run_dir)))
        there = "" if isinstance(run_dir, Path) else " --out DIR"
        print(f"\nrun     {run_dir}\nreport  ddk report {run_dir}{there}")
        print(f"export  ddk export {run_dir}")


def evaluate(
    model: Model,
    data: str = "",
    rows: int = 500,
    seq_len: int = 0,
    teacher: str = "",
    roles: Literal["all", "prompt", "response"] = "all",
    tasks: tuple[str, ...] = (),
    limit: int = 0,
    json: Flag = False,
) -> None:
    """Measure a model on the validation split of every domain, or score it on tasks.

    Args:
      model: Hugging Face directory or hub id, or run directory (its newest student).
      data: directory of prepared data; a run has its own.
      rows: rows of each domain; 0: all of them.
      seq_len: tokens that a row predicts; 0: as in the run, or as the model allows, at most 1024.
      teacher: model to compare with: cross-entropy of both, forward KL, overlap of the 8 largest
        logits.
      roles: tokens that the comparison counts.
      tasks: JSONL files (also .gz and .xz), folders or globs of tasks, in place of prepared data.
      limit: examples of each task, the same ones for every model; 0: all of them.
      json: print one JSON object: model, data, domains, and by domain nats (per token),
        bits_per_byte (nats / ln 2 * tokens / bytes of the split), perplexity, tokens; or model and
        tasks (task, metrics by name with value and stderr, baselines, examples, ...).
    """
    from ddk_jax.inspection import comparison_table, measurement_table, score_table
    from ddk_jax.training.metrics import to_json
    from ddk_jax.training.trained import compare_models, measure_model, score_model

    if teacher:
        comparison = compare_models(
            model, teacher, data=data, rows=rows, seq_len=seq_len, roles=roles
        )
        tree = to_json(comparison)
        print(json_format.dumps(tree) if json else comparison_table(comparison))
        return
    if tasks and data:
        raise UserError("--tasks and --data: name one of them, and call twice for both")
    if tasks:
        scores = score_model(model, tasks, limit=limit, seq_len=seq_len)
        tree = {"model": model, "tasks": to_json(scores)}
        print(json_format.dumps(tree) if json else score_table(scores))
        return
    if limit:
        raise UserError("--limit is for --tasks; with prepared data, say --rows")
    result = measure_model(model, data=data, rows=rows, seq_len=seq_len)
    if json:
        print(json_format.dumps(to_json(result)))
    else:
        print(measurement_table(result))


def export(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    out: Annotated[Positional[str | None], arg(metavar="[OUT]")] = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write a run's newest student as a Hugging Face directory with tokenizer and model card.

    Args:
      run: run directory, also gs://...
      out: where to, also gs://...; default: RUN/export.
      dtype: type of the weights.
    """
    from ddk_jax.places import resolve_place
    from ddk_jax.training.export import export_run

    place = resolve_place(run)
    print(export_run(place, out or str(place / "export"), dtype=dtype))


def import_(
    file: Annotated[Positional[Path], arg(metavar="FILE.gguf")],
    out: Annotated[Positional[str], arg(metavar="OUT")],
    dtype: Literal["float32", "bfloat16"] = "float32",
    tokenizer: Path | None = None,
    end_token: str = "",
) -> None:
    """Convert a GGUF file (llama.cpp) into a Hugging Face directory, tokenizer included.

    Args:
      file: of the architecture `llama`: Llama, Mistral, SmolLM2, ...; any quantisation.
      out: where to.
      dtype: type of the weights.
      tokenizer: directory with the model's tokenizer.json, where the file's cannot be rebuilt.
      end_token: control token that ends a document; default: the file's end token, which in a chat
        model may be the end of a turn.
    """
    from ddk_jax.models.gguf.convert import import_gguf
    from ddk_jax.training.transfer import TransferLine

    with TransferLine(file.name) as line:
        import_gguf(
            file, out, dtype=dtype, tokenizer=tokenizer, end_token=end_token, progress=line.update
        )
    print(out)


def report(
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN...")], out: Path | None = None
) -> None:
    """Draw what happened in a run, or compare several: figures and one HTML page.

    Args:
      runs: run directories, also gs://...
      out: where to, on this machine; default for a single run: RUN/report.
    """
    from ddk_jax.analysis.report import write_report
    from ddk_jax.places import resolve_place

    if out is None and len(runs) > 1:
        raise UserError("several runs: say with --out where their comparison goes")
    place = out or resolve_place(runs[0] if runs else "") / "report"
    if not isinstance(place, Path):
        raise UserError("the run is in a bucket: say with --out where its report goes")
    print(write_report(runs, place))


def generate(
    model: Model,
    texts: Annotated[Positional[tuple[str, ...]], arg(metavar="[PROMPT...]")] = (),
    prompts: Path | None = None,
    chat: Flag = False,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 1.0,
    stop: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Continue prompts with a model, all at once.

    Args:
      model: Hugging Face directory or hub id, or run directory (its newest student).
      texts: texts to continue.
      prompts: file with more of them, one in a line.
      chat: put each prompt into the tokenizer's chat template, and print the answers alone.
      max_new_tokens: tokens to add at most.
      temperature: of the softmax; 0 takes the most probable token.
      top_k: choose among this many most probable tokens; 0: all.
      top_p: choose among the fewest most probable tokens that together have this probability.
      stop: tokens that end a text, besides the model's own.
      seed: the same seed gives the same text.
    """
    import jax

    from ddk_jax.data.tokenize import Tokenizer
    from ddk_jax.models.sampling import Sampling
    from ddk_jax.samples import continued_texts, read_prompts, stop_tokens
    from ddk_jax.training.trained import open_model

    given = [*texts, *(read_prompts(prompts) if prompts else ())]
    if not given:
        raise UserError("name at least one prompt, in quotes, or a file of them with --prompts")
    opened = open_model(model)
    tokenizer = Tokenizer(opened.tokenizer)
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop_tokens(tokenizer, stop),
    )
    added = continued_texts(
        opened.decoder,
        opened.params,
        tokenizer,
        given,
        sampling,
        key=jax.random.key(seed),
        chat=chat,
    )
    whole = added if chat else [text + more for text, more in zip(given, added, strict=True)]
    print("\n\n".join(whole))


def inspect(path: Annotated[Positional[str], arg(metavar="PATH")]) -> None:
    """Say what a run, prepared data or a model directory holds.

    Args:
      path: the directory.
    """
    from ddk_jax.inspection import describe

    print(describe(path))


def prune(
    teacher: Annotated[Positional[str], arg(metavar="TEACHER")],
    data: str,
    out: str,
    layers: int = 0,
    hidden: int = 0,
    kv_heads: int = 0,
    ffn: int = 0,
    method: Literal["activation", "gradient", "first"] = "activation",
    rows: int = 16,
    seq_len: int = 0,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Cut a student from a teacher: the layers, widths and heads that matter most on data.

    Args:
      teacher: Hugging Face directory or hub id.
      data: directory of prepared data, which the importance is measured on.
      out: where to write the student, a Hugging Face directory.
      layers: that are left; 0: all.
      hidden: width of the residual stream that is left; 0: all.
      kv_heads: key/value heads of every layer that are left, with their query heads; 0: all.
      ffn: inner width of the MLPs that is left; 0: all.
      method: what the importance follows from: the activations, the gradients of the loss, or
        nothing (the first parts are left).
      rows: rows of each domain that are read.
      seq_len: tokens that a row predicts; 0: as many as the model allows, at most 512.
      seed: draws the rows.
      dtype: type of the weights.
    """
    from ddk_jax.inspection import pruning_table
    from ddk_jax.models.prune import Size
    from ddk_jax.training.pruning import prune_model

    result = prune_model(
        teacher,
        out,
        data=data,
        size=Size(layers=layers, hidden=hidden, groups=kv_heads, neurons=ffn),
        method=method,
        rows=rows,
        seq_len=seq_len,
        seed=seed,
        dtype=dtype,
    )
    print(f"{pruning_table(result)}\n\n{out}")


def advise(
    config: Annotated[Positional[Path | None], arg(metavar="[CONFIG]")] = None,
    student: str = "",
    teacher: tuple[str, ...] = (),
    tokens: str = "",
    teacher_tokens: str = "",
    teacher_nats: tuple[float, ...] = (),
    json: Flag = False,
) -> None:
    """Say which teacher suits a student, or which student a teacher, by two published laws.

    Args:
      config: YAML file whose student, teachers and tokens are meant where none are named here.
      student: model directory, or a size such as 350M.
      teacher: the same; several are ranked.
      tokens: that the student is trained on, such as 15B.
      teacher_tokens: that the teachers were trained on; default: 20 a parameter.
      teacher_nats: losses of the teachers where they are known, instead.
      json: print one JSON object: student, best_teacher (parameters), outlook (by the scaling law),
        candidates (teacher, ratio, warning, prediction).
    """
    from ddk_jax.advice import advice_text
    from ddk_jax.advice import advise as ask
    from ddk_jax.training.metrics import to_json

    advice = ask(
        config,
        student=student,
        teachers=teacher,
        tokens=tokens,
        teacher_tokens=teacher_tokens,
        teacher_nats=teacher_nats,
    )
    print(json_format.dumps(to_json(advice)) if json else advice_text(advice))


def study(
    studies: Annotated[Positional[tuple[Path, ...]], arg(metavar="STUDY...")],
    only: str = "",
    collect: Flag = False,
) -> None:
    """Run a grid of methods and seeds, or what is left of it, and compare the students.

    Args:
      studies: YAML files (`docs/study.md`), one after the other.
      only: run a part of the grid, such as 2/4; processes may also share a grid without it.
      collect: run nothing; write tables and figures of what is finished.
    """
    from ddk_jax.study.grid import collect_study, run_study
    from ddk_jax.study.page import study_text

    if not studies:
        raise UserError("name at least one study, such as configs/study/long.yaml")
    for path in studies:
        done = collect_study(path) if collect else run_study(path, only)
        if done is None:
            print("stopped and saved; the same command continues")
            return
        print(f"{study_text(done.results)}\n\npage  {done.page}")


def plan(
    config: Settings,
    topology: str = "",
    level: Literal["O0", "O1", "O2", "O3"] = "O1",
    search: Flag = False,
    json: Flag = False,
    list: Flag = False,
) -> None:
    """Compile a run for a TPU slice that need not be there: memory, FLOPs, time; does it fit?

    Args:
      config: the run; of its data and models, shapes are enough.
      topology: the slice, such as v5e:4x4.
      level: how hard the compiler tries; O2, as in a run, takes several times as long.
      search: try meshes, sizes of micro-batches and rematerialisation, and take the fastest.
      json: print one JSON object; docs/plan.md says what it holds.
      list: print the slices that there are.
    """
    from ddk_jax.planning.command import run_plan
    from ddk_jax.planning.slices import slice_table

    if list:
        print(slice_table())
        return
    run_plan(
        config, topology, level=level, searching=search, as_json=json, out=print, progress=_log.info
    )


def doctor(config: Settings, json: Flag = False) -> None:
    """Check the machine and, given a config, whether its run can start.

    Args:
      config: checked where it says more than the defaults.
      json: print one JSON object: ok, checks (name, ok, value, advice).
    """
    from ddk_jax.doctor import examine

    checks = examine(config)
    bad = [check.name for check in checks if not check.ok]
    if json:
        tree = {"ok": not bad, "checks": [check._asdict() for check in checks]}
        print(json_format.dumps(tree, indent=1))
    else:
        for check in checks:
            print(f"{'ok ' if check.ok else 'BAD'}  {check.name}: {check.value}")
            if check.advice:
                print(f"     -> {check.advice}")
    if bad:
        raise UserError(f"not fit for a run: {', '.join(bad)}")


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__.rstrip("_"): command
    for command in (
        quickstart,
        prepare,
        train,
        evaluate,
        export,
        import_,
        report,
        generate,
        inspect,
        prune,
        advise,
        study,
        plan,
        doctor,
    )
}
_CONFIGURED = ("prepare", "train", "plan", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code; errors of the user are one line on standard error."""
    words = list(sys.argv[1:] if argv is None else argv)
    with console():
        try:
            _run(words)
            sys.stdout.flush()
            return 0
        except UserError as error:
            return _fail(error, error.exit_code)
        except BrokenPipeError:
            # Whoever read our output has seen enough, as `head` does. Python must not flush again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            return _fail(error, StorageError.exit_code)
        except KeyboardInterrupt:
            print("ddk: interrupted", file=sys.stderr)
            return 130
        except SystemExit as leave:  # tyro has shown help, or what it did not understand
            return UserError.exit_code if leave.code else 0


def _run(words: list[str]) -> None:
    if not words:
        print(_overview(), file=sys.stderr)
        raise UserError("name a command")
    name, *rest = words
    if name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"ddk_jax {__version__}")
    elif name not in COMMANDS:
        raise UserError(f"unknown command {name}: {suggest(name, list(COMMANDS))}")
    else:
        # Compiled programs are kept between runs. jax reads this when it is imported.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "ddk_jax" / "xla"))
        parse(name, rest)()


def parse(name: str, words: list[str]) -> Callable[[], None]:
    """Bind a command to what the user gave it.

    Raises:
      UserError: a value that cannot be meant. SystemExit: after help or a usage error (tyro).
    """
    return bound(COMMANDS[name], f"ddk {name}", words, configured=name in _CONFIGURED)


def _overview() -> str:
    lines = [f"  {name:<12}{(f.__doc__ or '').splitlines()[0]}" for name, f in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ddk [-h] [--version] COMMAND ...",
            "",
            "Distil a large language model into a small one, domain by domain.",
            "",
            *lines,
            "",
            "`ddk COMMAND --help` lists the options of a command.",
        ]
    )


def _fail(error: Exception, code: int) -> int:
    print(f"ddk: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
