"""A whole run in miniature: three domains of bytes, a random teacher, a student of two layers.

`build(root)` writes what a run reads, once; `config(root, run_dir, ...)` describes a run over it:
12 steps of 8 rows, an update of the mixture every 4. `conftest.tiny_root` is the shared copy.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ddk_jax.config import Config
from ddk_jax.data.pipeline import MixturePipeline, PipelineState
from ddk_jax.data.prepare import prepare
from ddk_jax.data.rows import HostBatch
from ddk_jax.losses.chunked import ChunkPlan
from ddk_jax.models import hf
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.mesh import make_mesh
from ddk_jax.plain import from_plain, to_plain
from ddk_jax.training import build as build_module
from ddk_jax.training import evaluate as evaluate_module
from ddk_jax.training.build import Job
from ddk_jax.training.checkpoint import read_latest
from ddk_jax.training.loop import RunSummary, train
from ddk_jax.training.metrics import read_metrics
from ddk_jax.training.micro import Teachers
from ddk_jax.training.step import EvalStep, TrainStep, make_eval_step

DOMAINS = ("words", "digits", "echo")
"""Their entropies differ, so a student soon learns one of them better than another."""
SEQ_LEN = 16
ROWS = 8
STEPS = 12
INTERVAL = 4
VOCABULARY = 257
TEACHER = ModelSpec(
    vocab_size=VOCABULARY,
    hidden_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    ffn_size=32,
    max_positions=SEQ_LEN,
)
STUDENT = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "ffn_size": 24,
    "max_positions": SEQ_LEN,
}

_END = "<|endoftext|>"
_WORDS = "the a cat dog runs over under blue green one two three four of and then".split()


def write_tokenizer(directory: Path, *, swapped: bool = False) -> Path:
    """One token a byte, and the end token. `swapped` exchanges the ids of two bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if swapped:
        alphabet[0], alphabet[1] = alphabet[1], alphabet[0]
    vocabulary = {text: number for number, text in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END])
    assert tokenizer.get_vocab_size() == VOCABULARY
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": _END}))
    return directory


def write_teacher(directory: Path, tokenizer: Path, *, seed: int = 1) -> Path:
    """A model directory of random weights."""
    random = np.random.default_rng(seed)
    # Not `Decoder.init`, which takes ten seconds to compile.
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * random.standard_normal(leaf.shape), jnp.float32),
        Decoder(spec=TEACHER).abstract(),
    )
    params["norm"]["scale"] = jnp.ones_like(params["norm"]["scale"])
    hf.export(params, TEACHER, directory, tokenizer_dir=tokenizer, card="A random model.\n")
    return directory


def build(root: Path) -> Path:
    """Write the sources, the tokenizer, the prepared data and the teacher under `root`."""
    rng = np.random.default_rng(0)
    documents = {
        "words": [" ".join(rng.choice(_WORDS, 14)) for _ in range(40)],
        "digits": ["".join(map(str, rng.integers(0, 10, 60))) for _ in range(40)],
        "echo": [f"{'ab' * 20}{i}" for i in range(12)],  # 30 rows: gone through more than once
    }
    for name, texts in documents.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / f"{name}.jsonl").write_text(lines)
    write_teacher(root / "teacher", write_tokenizer(root / "tokenizer"))
    prepare(config(root, root / "unused").data, progress=lambda _: None)
    return root


def config(root: Path, run_dir: Path, **changes: Any) -> Config:
    """The tiny run in `run_dir`; `changes` by dotted key: `**{"train.steps": 4}`."""
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir), "compute_dtype": "float32", "log_every_steps": 1},
        "data": {
            "dir": str(root / "data"),
            "tokenizer": str(root / "tokenizer"),
            "seq_len": SEQ_LEN,
            "validation_fraction": 0.15,
            "domains": [
                {"name": name, "sources": [{"path": str(root / f"{name}.jsonl")}]}
                for name in DOMAINS
            ],
        },
        "teacher": {"path": str(root / "teacher")},
        "student": {"spec": dict(STUDENT)},
        "objective": {"logits_mib": 64 * VOCABULARY * 4 / 2**20},
        "mixture": {"gap": "loss_difference", "interval_steps": INTERVAL},
        "optim": {"learning_rate": 0.03, "final_learning_rate": 0.003, "warmup_steps": 2},
        "train": {"steps": STEPS, "rows_per_step": ROWS},
        "evaluation": {"rows_per_domain": 8, "batch_rows": 8},
        "checkpoint": {"every_steps": 4},
    }
    for key, value in changes.items():
        *path, last = key.split(".")
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    return from_plain(Config, tree)


def lasting_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that no interruption may change."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [
        {key: value for key, value in line.items() if key != "timing"}
        for line in lines
        if line["event"] != "checkpoint"
    ]


def outcome(run: Config) -> dict[str, Any]:
    """All that a run came to and that no interruption may change, bit by bit.

    The arrays and the host tree of the last checkpoint, the metrics, the summary; without the clock
    and without the digest of the config, which names the run's directory.
    """
    run_dir = Path(run.run.dir)
    restored = read_latest(run_dir / "checkpoints", Job(run).abstract_state())
    assert restored is not None
    summary = json.loads((run_dir / "summary.json").read_text())
    return {
        "step": restored.step,
        "arrays": state_digest(restored.state),
        "host": {key: value for key, value in restored.host.items() if key != "digest"},
        "metrics": lasting_metrics(run_dir),
        "summary": {k: v for k, v in summary.items() if k not in ("timing", "config_digest")},
    }


def state_digest(tree: Any) -> str:
    """SHA-256 over the paths, types, shapes and bits of all leaves."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class Finished(NamedTuple):
    """A run that was not interrupted, on one device."""

    config: Config
    run_dir: Path
    summary: RunSummary
    batches: dict[int, HostBatch]
    """The rows of each step."""
    lines: list[dict[str, Any]]
    """Its metrics."""

    def of(self, event: str) -> list[dict[str, Any]]:
        """The lines of one event."""
        return [line for line in self.lines if line["event"] == event]


def finish(root: Path, run_dir: Path) -> Finished:
    """Run `config(root, run_dir)` and watch it."""
    described = config(root, run_dir)
    with pytest.MonkeyPatch.context() as monkeypatch, quick_programs(monkeypatch):
        use_devices(monkeypatch, 1)
        batches: dict[int, HostBatch] = {}
        watch_batches(monkeypatch, batches.__setitem__)
        summary = train(described)
    lines = read_metrics(run_dir / "metrics.jsonl")
    return Finished(described, run_dir, summary, batches, lines)


def watch_batches(
    monkeypatch: pytest.MonkeyPatch, callback: Callable[[int, HostBatch], object]
) -> None:
    """Call `callback(step, rows)` whenever the loop takes the rows of its next step."""
    original = MixturePipeline.__next__

    def watched(pipeline: MixturePipeline) -> tuple[HostBatch, PipelineState]:
        batch, state = original(pipeline)
        callback(state["next_row"] // ROWS, batch)
        return batch, state

    monkeypatch.setattr(MixturePipeline, "__next__", watched)


@contextmanager
def quick_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make programs quickly, not quick programs: what a tiny run spends its time on.

    XLA optimises little, and runs of one kind share the program of the train step. For whole
    modules of tests, since bits compare between runs of the same programs only.
    """
    make, before = Job.train_step, jax.config.read("jax_disable_most_optimizations")

    def shared(job: Job) -> TrainStep:
        kind = to_plain(job.config)
        relevant = [kind[name] for name in ("student", "teacher", "objective", "optim")]
        key = json.dumps([relevant, job.config.train.steps, len(job.domains), job.mesh.size])
        if key not in _train_steps:
            _train_steps[key] = make(job)
        return _train_steps[key]

    monkeypatch.setattr(Job, "train_step", shared)
    monkeypatch.setattr(evaluate_module, "make_eval_step", _eval_step)
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


_train_steps: dict[str, TrainStep] = {}
_eval_steps: dict[Any, EvalStep] = {}


def _eval_step(models: Teachers, mesh: Any, *, num_domains: int, plan: ChunkPlan) -> EvalStep:
    key = models.models, models.domain_weights.tobytes(), mesh, num_domains, plan
    if key not in _eval_steps:
        _eval_steps[key] = make_eval_step(models, mesh, num_domains=num_domains, plan=plan)
    return _eval_steps[key]


def use_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let runs see the first `count` simulated devices."""
    devices = jax.devices("cpu")[:count]
    monkeypatch.setattr(build_module, "make_mesh", functools.partial(make_mesh, devices=devices))
