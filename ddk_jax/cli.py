"""The command line: `ddk COMMAND ...`, which is also `python -m ddk_jax`.

A command is a function below; its parameters are its options. `prepare`, `train` and `doctor` take
a YAML file and after it an override for any of its fields: `ddk train x.yaml --train.steps 100`.

Exit codes: 0 done, or stopped and saved; 64 usage or config; 65 data; 70 diverged; 74 input or
output; 75 another process holds the run; 130 interrupted.
"""

from __future__ import annotations

import functools
import json as json_format
import logging
import os
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm
from tyro.conf import FlagCreatePairsOff, Positional, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ddk_jax import __version__
from ddk_jax.config import (
    Config,
    DataConfig,
    DomainConfig,
    OtherTeacherConfig,
    ScheduleConfig,
    SourceConfig,
    TeacherConfig,
    load_config,
)
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


def prepare(config: Settings) -> None:
    """Tokenise the config's sources into shards for training, once."""
    from ddk_jax.data.prepare import prepare as write_shards

    write_shards(config.data, progress=_log.info)


def train(config: Settings) -> None:
    """Distil a student as the config says, or continue the run in its run.dir."""
    from ddk_jax.analysis.runs import load_run
    from ddk_jax.analysis.tables import domain_table
    from ddk_jax.config import resolve_path
    from ddk_jax.training.loop import train as run

    summary = run(config)
    run_dir = resolve_path(config.run.dir)
    if summary.stop_reason == "preempted":
        print(f"stopped and saved at step {summary.steps}; to continue:")
        print(f"  ddk train {run_dir / 'config.yaml'}")
    else:
        print(domain_table(load_run(run_dir)))
        print(f"\nrun     {run_dir}\nreport  ddk report {run_dir}\nexport  ddk export {run_dir}")


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
      model: Hugging Face directory, or run directory (its newest student).
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
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    out: Annotated[Positional[Path | None], arg(metavar="[OUT]")] = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write a run's newest student as a Hugging Face directory with tokenizer and model card.

    Args:
      run: run directory.
      out: where to; default: RUN/export.
      dtype: type of the weights.
    """
    from ddk_jax.training.export import export_run

    print(export_run(run, out or run / "export", dtype=dtype))


def report(
    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN...")], out: Path | None = None
) -> None:
    """Draw what happened in a run, or compare several: figures and one HTML page.

    Args:
      runs: run directories.
      out: where to; default for a single run: RUN/report.
    """
    from ddk_jax.analysis.report import write_report

    if out is None and len(runs) > 1:
        raise UserError("several runs: say with --out where their comparison goes")
    print(write_report(runs, out or Path(*runs[:1]) / "report"))


def generate(
    model: Model,
    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT...")],
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> None:
    """Continue prompts with a model.

    Args:
      model: Hugging Face directory, or run directory (its newest student).
      prompts: texts to continue.
      max_new_tokens: tokens to add at most.
      temperature: of the softmax; 0 takes the most probable token.
      top_k: choose among this many most probable tokens; 0: all.
      seed: the same seed gives the same text.
    """
    import jax

    from ddk_jax.data.tokenize import Tokenizer
    from ddk_jax.models.generate import generate as continuations
    from ddk_jax.training.trained import open_model

    if not prompts:
        raise UserError("name at least one prompt, in quotes")
    opened = open_model(model)
    tokenizer = Tokenizer(opened.tokenizer)
    found = continuations(
        opened.decoder,
        opened.params,
        [ids.tolist() for ids in tokenizer.encode(prompts)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        end_id=tokenizer.end_id,
        key=jax.random.key(seed),
    )
    texts = [text + tokenizer.decode(ids) for text, ids in zip(prompts, found, strict=True)]
    print("\n\n".join(texts))


def inspect(path: Annotated[Positional[str], arg(metavar="PATH")]) -> None:
    """Say what a run, prepared data or a model directory holds.

    Args:
      path: the directory.
    """
    from ddk_jax.inspection import describe

    print(describe(path))


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
    command.__name__: command
    for command in (
        quickstart,
        prepare,
        train,
        evaluate,
        export,
        report,
        generate,
        inspect,
        doctor,
    )
}
_CONFIGURED = ("prepare", "train", "doctor")

# For --help without a file: a domain with a source, so that their fields are listed too; likewise
# a second teacher.
_EXAMPLE = Config(
    data=DataConfig(domains=(DomainConfig(name="NAME", sources=(SourceConfig(path="PATH"),)),)),
    teacher=TeacherConfig(path="PATH", others=(OtherTeacherConfig(path="PATH"),)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code; errors of the user are one line on standard error."""
    words = list(sys.argv[1:] if argv is None else argv)
    with _console():
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
    command, usage = COMMANDS[name], f"ddk {name}"

    # tyro calls what it is given; but parsing and doing are better kept apart.
    @functools.wraps(command)
    def bind(*args: object, **kwargs: object) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    if name in _CONFIGURED:
        usage += " [CONFIG]" if name == "doctor" else " CONFIG"
        config, words = _read_config(usage, words)
        bind = functools.partial(bind, config=config)
    return tyro.cli(bind, args=words, prog=usage, registry=_numbers())


def _numbers() -> ConstructorRegistry:
    """What may be a number or a schedule is a number here; schedules are for YAML."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def number_or_schedule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if ScheduleConfig not in typing.get_args(info.type):
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="FLOAT",
            instance_from_str=lambda words: float(words[0]),
            is_instance=lambda value: isinstance(value, int | float | ScheduleConfig),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _read_config(usage: str, words: list[str]) -> tuple[Config, list[str]]:
    """The YAML file, which comes first, and the words after it."""
    if words and not words[0].startswith("-"):
        return load_config(words[0]), words[1:]
    if "-h" in words or "--help" in words:
        return _EXAMPLE, words
    if usage.startswith("ddk doctor"):
        return Config(), words
    raise UserError(f"{usage} [--section.field VALUE ...]: name the YAML file before any option")


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


class _Handler(logging.Handler):
    """Messages on standard error, above the progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        tqdm.write(level + record.getMessage(), file=sys.stderr)


@contextmanager
def _console() -> Iterator[None]:
    """Show what the package logs, and of other packages only what went wrong."""
    logger, handler = logging.getLogger("ddk_jax"), _Handler()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for name in ("absl", "jax", "orbax", "grain"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they speak to programmers
            yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
