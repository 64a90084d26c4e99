"""Time and memory of one distillation step, beside torch + transformers and Tunix.

    python benchmarks/step.py                        # on the CPU; makes an environment for Tunix
    python benchmarks/step.py cpu --against torch    # without Tunix
    python benchmarks/step.py tpu                    # compiled for an absent chip, and not run

On the CPU every contender is a process of its own, and they take their steps in turn: from the same
weights, on the same rows, for the same loss, with the same optimizer. Their losses have to agree
before any time is taken.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import contest
import jax
import numpy as np
import tokenizers
import tyro
from compiled_step import Figures, figures
from losses import HAS_TORCH, MIB, num_threads, on_cpu, rendered
from losses import Options as LossOptions
from losses import setting as machine

from ddk_jax.config import load_config
from ddk_jax.models import families, hf
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.compiled import Level
from ddk_jax.planning.job import PlannedJob
from ddk_jax.planning.minimum import visible_share
from ddk_jax.planning.slices import open_slice

HERE = Path(__file__).parent
TUNIX = "0.1.7"
OTHERS = ("torch", "tunix")
WARM_UP = 3
"""Steps of each contender before any counts; their losses are compared."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """Compare distillation steps on this CPU, in float32."""

    against: str = ",".join(OTHERS)
    """Who else, with commas between."""
    rows: int = 4
    """Rows of a step."""
    seq_len: int = 256
    """Tokens that a row predicts."""
    vocab: int = 32_000
    """Entries of the vocabulary."""
    hidden: int = 256
    """Hidden size of the student; the teacher's is twice that."""
    layers: int = 4
    """Layers of the student; the teacher has twice as many."""
    logits_mib: float = 32.0
    """Our budget for logits (`objective.logits_mib`)."""
    remat: str = "full"
    """What our student's backward pass computes again (`student.remat`)."""
    runs: int = 3
    """Times that all contenders are started."""
    repeats: int = 5
    """Timed steps of each, every time; they take turns."""
    cache: Path = Path("~/.cache/ddk_jax")
    """Where the environment for Tunix is, or is made (1.6 GB)."""
    json: Path | None = None
    """Write every single measurement to this file as well."""
    markdown: bool = False
    """Print the table in Markdown."""


@dataclass(frozen=True, kw_only=True)
class Tpu:
    """Ask the TPU compiler about the steps of a pair of models, on one chip."""

    config: Path = HERE.parent / "configs" / "smollm2_360m_135m_v5e1.yaml"
    """What we train; Tunix gets its models and its rows."""
    chip: str = "v5e"
    """Generation."""
    level: Level = "O1"
    """How hard the compiler tries. At O2 it takes minutes."""
    against: str = "tunix"
    """Who else; empty: nobody."""
    cache: Path = Path("~/.cache/ddk_jax")
    """Where the environment for Tunix is, or is made (1.6 GB)."""
    json: Path | None = None
    """Write the figures to this file as well."""
    markdown: bool = False
    """Print the table in Markdown."""


Options: TypeAlias = (
    Annotated[Cpu, tyro.conf.subcommand("cpu")] | Annotated[Tpu, tyro.conf.subcommand("tpu")]
)


def chosen(against: str) -> list[str]:
    """The names in an option.

    Raises:
      ValueError: one that is no contender.
    """
    names = [name for name in against.split(",") if name]
    for name in names:
        if name not in OTHERS:
            raise ValueError(f"--against: {name!r} is none of: {', '.join(OTHERS)}")
    return names


# The task


def spec_of(options: Cpu, factor: int) -> ModelSpec:
    """A Llama with 8 heads, `factor` times as wide and deep as the student."""
    hidden = factor * options.hidden
    return ModelSpec(
        vocab_size=options.vocab,
        hidden_size=hidden,
        num_layers=factor * options.layers,
        num_heads=8,
        num_kv_heads=8,
        ffn_size=-(-8 * hidden // 3 // 32) * 32,
        max_positions=options.seq_len,
        rope_theta=1_000_000.0,  # Tunix's Llama knows no other
    )


def write_task(folder: Path, options: Cpu) -> None:
    """What `contest.py` describes: random models and rows, the same ones every time."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, options.vocab, (options.rows, options.seq_len + 1), np.int32)
    np.save(folder / contest.ROWS, tokens, allow_pickle=False)
    alone = tokenizers.Tokenizer(tokenizers.models.BPE())
    alone.add_special_tokens(["<|endoftext|>"])  # an export needs a tokenizer; nothing reads it
    alone.save(str(folder / "tokenizer.json"))

    def value(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        return 0.05 * rng.standard_normal(leaf.shape, np.float32)

    for name, factor in ((contest.TEACHER, 2), (contest.STUDENT, 1)):
        spec = spec_of(options, factor)
        params = jax.tree.map_with_path(value, Decoder(spec=spec).abstract())
        card = "Random weights.\n"
        hf.export(params, spec, folder / name, tokenizer_dir=folder, card=card)


def tunix_python(cache: Path, *packages: str) -> str:
    """The interpreter of an environment with Tunix and our jax; it is made if it is not there.

    Args:
      cache: where.
      *packages: that it needs besides.

    Raises:
      ValueError: it cannot be made; with what pip says.
    """
    folder = cache.expanduser() / f"tunix-{TUNIX}"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    wanted = [f"google-tunix=={TUNIX}", f"jax=={jax.__version__}", *packages]
    commands = [[str(python), "-m", "pip", "install", "--quiet", *wanted]]
    if not python.exists():
        print(f"making an environment for Tunix in {folder}", file=sys.stderr)
        commands.insert(0, [sys.executable, "-m", "venv", str(folder)])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            tail = "\n".join(done.stderr.splitlines()[-8:])
            raise ValueError(f"no environment for Tunix {TUNIX} in {folder}:\n{tail}")
    return str(python)


# On the CPU


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What every contender took; the n-th steps of all followed one another."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, list[int]] = field(default_factory=dict)
    """Of every start: the most that a process held while it trained."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Of the first steps, of the last start."""

    def ratio(self, other: str) -> np.ndarray:
        """Our time over another's, step by step."""
        return np.array(self.seconds["ours"]) / np.array(self.seconds[other])


def commands_of(options: Cpu, folder: Path) -> dict[str, list[str]]:
    """How each contender is started; those that cannot be had are left out, with a word.

    Raises:
      ValueError: an unknown contender.
    """
    settings = {
        "objective": {"logits_mib": options.logits_mib},
        "student": {"remat": options.remat},
    }
    ours = [sys.executable, str(HERE / "our_step.py"), str(folder), json.dumps(settings)]
    found = {"ours": ours}
    for name in chosen(options.against):
        script = [str(HERE / f"{name}_step.py"), str(folder)]
        if name == "torch" and HAS_TORCH:
            found[name] = [sys.executable, *script, str(num_threads())]
        elif name == "torch":
            print("torch is not installed (it is in the extra `test`): left out")
        else:
            try:
                found[name] = [tunix_python(options.cache), *script]
            except ValueError as error:
                print(f"{error}\nTunix is left out")
    return found


def check(losses: dict[str, list[float]]) -> None:
    """That all contenders do the same.

    Raises:
      ValueError: a loss of the first steps is off by more than 1e-3 of ours.
    """
    for name, theirs in losses.items():
        if not np.allclose(theirs, losses["ours"], rtol=1e-3, atol=0):
            raise ValueError(f"losses of the first steps: ours {losses['ours']}, {name} {theirs}")


def measure(commands: dict[str, list[str]], folder: Path, repeats: int, found: Measured) -> None:
    """Start all contenders, compare what they compute, and let them take turns.

    Args:
      commands: by name.
      folder: of the task.
      repeats: timed steps of each.
      found: is added to.

    Raises:
      ValueError: one of them fails, or computes something else.
    """
    with ExitStack() as stack:
        every = {
            name: stack.enter_context(contest.Contender(name, command, folder / f"{name}.log", {}))
            for name, command in commands.items()
        }
        for name, one in every.items():
            one.wait()
            found.losses[name] = [one.step().loss for _ in range(WARM_UP)]
            one.forget_peak()
        check(found.losses)
        names, peaks = list(every), dict.fromkeys(every, 0)
        for turn in range(repeats):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                taken = every[name].step()
                found.seconds.setdefault(name, []).append(taken.seconds)
                peaks[name] = max(peaks[name], taken.peak_bytes)
        for name, peak in peaks.items():
            found.peak_bytes.setdefault(name, []).append(peak)


def cpu_table(found: Measured) -> list[list[str]]:
    """Head and rows. Ratios are ours over theirs: below 1 we are better."""
    table = [["", "seconds", "time, ratio", "peak MiB", "memory, ratio"]]
    ours = np.median(found.peak_bytes["ours"])
    for name, seconds in found.seconds.items():
        peak = np.median(found.peak_bytes[name])
        other = name != "ours"
        table.append(
            [
                name if name != "tunix" else f"Tunix {TUNIX}",
                spread(np.array(seconds)),
                spread(found.ratio(name)) if other else "",
                f"{peak / MIB:.0f}" if peak else "",
                f"{ours / peak:.2f}" if other and peak else "",
            ]
        )
    return table


def spread(values: np.ndarray) -> str:
    """Median, and first and third quartile."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def on_this_cpu(options: Cpu) -> None:
    """Measure, print, save.

    Raises:
      ValueError: an unknown contender; one that fails, or computes something else.
    """
    chosen(options.against)
    found = Measured()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, options)
        commands = commands_of(options, folder)
        for number in range(options.runs):
            measure(commands, folder, options.repeats, found)
            print(f"{number + 1} of {options.runs}", file=sys.stderr)
    where = machine(LossOptions())
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print("Median (first to third quartile); ratios: ours over theirs, of neighbouring steps.")
    print(rendered(cpu_table(found), markdown=options.markdown))
    save(options.json, {"setting": where, "options": asked(options), **vars(found)})


# The TPU compiler


def our_figures(options: Tpu) -> Figures:
    """Of the train step of the config."""
    _, devices = open_slice(f"{options.chip}:1x1")
    job = PlannedJob(load_config(options.config), devices)
    specs = (job.student.spec, *job.teachers.specs)
    return figures(
        next(iter(job.steps())).traced,
        options.chip,
        options.level,
        visible=visible_share(specs, job.config.data.seq_len),
        head_width=min(spec.head_width for spec in specs),
    )


def tunix_figures(options: Tpu) -> Figures:
    """Of its two programs together, one after the other.

    Raises:
      ValueError: there is no environment for it, or it fails.
    """
    config = load_config(options.config)
    specs = {contest.TEACHER: config.teacher.spec, contest.STUDENT: config.student.spec}
    python = tunix_python(options.cache, f"libtpu=={importlib.metadata.version('libtpu')}")
    with tempfile.TemporaryDirectory() as name:
        for model, spec in specs.items():
            directory = Path(name) / model
            directory.mkdir()
            text = json.dumps(families.config_from_spec(spec))
            (directory / "config.json").write_text(text, encoding="utf-8")
        shape = [str(config.train.rows_per_step), str(config.data.seq_len)]
        command = [python, str(HERE / "tunix_step.py"), name, *shape, options.chip, options.level]
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}  # for compiled_step.py
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=False, env=environment
        )
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-8:])
        raise ValueError(f"Tunix {TUNIX} could not be compiled:\n{tail}")
    return together(json.loads(done.stdout))


def together(found: dict[str, dict[str, Any]]) -> Figures:
    """Two programs that follow each other; what one does not read stays on the chip meanwhile."""
    names = ("teacher", "train")
    parts = [Figures(**found[name]) for name in names]
    resident = [found["resident_bytes"][name] for name in names]
    return Figures(
        max(part.peak_bytes + other for part, other in zip(parts, resident, strict=True)),
        sum(part.flops for part in parts),
        sum(part.hbm_bytes for part in parts),
        sum(part.seconds for part in parts),
    )


def tpu_table(found: dict[str, Figures]) -> list[list[str]]:
    """Head and rows."""
    table = [["", "peak GiB", "TFLOPs", "HBM GB", "estimated ms"]]
    for name, row in found.items():
        cells = [f"{row.peak_bytes / GIB:.2f}", f"{row.flops / 1e12:.1f}"]
        table.append([name, *cells, f"{row.hbm_bytes / 1e9:.0f}", f"{row.seconds * 1e3:.0f}"])
    return table


def for_a_tpu(options: Tpu) -> None:
    """Compile, print, save.

    Raises:
      ValueError: an unknown contender, config or chip.
      OutOfMemoryError: the config does not fit on the chip.
    """
    others = chosen(options.against)
    found = {"ours": our_figures(options)}
    if "tunix" in others:
        try:
            found[f"Tunix {TUNIX}"] = tunix_figures(options)
        except ValueError as error:
            print(f"{error}\nTunix is left out")
    print(f"{options.config.name}, one {options.chip} chip, level {options.level}; not run")
    print(rendered(tpu_table(found), markdown=options.markdown))
    rows = {name: row._asdict() for name, row in found.items()}
    save(options.json, {"options": asked(options), "figures": rows})


def asked(options: Cpu | Tpu) -> dict[str, Any]:
    """The options that figures depend on."""
    left_out = ("json", "markdown", "cache")
    return {key: str(value) for key, value in vars(options).items() if key not in left_out}


def save(path: Path | None, found: dict[str, Any]) -> None:
    """As JSON, if it was asked for."""
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(words: Sequence[str]) -> None:
    """The command."""
    on_cpu()
    options: Any = tyro.cli(Options, description=__doc__, args=list(words) or ["cpu"])  # type: ignore[arg-type]
    if isinstance(options, Tpu):
        for_a_tpu(options)
    else:
        on_this_cpu(options)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, ImportError) as error:
        sys.exit(str(error))
