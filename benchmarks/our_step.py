"""The train step of `ddk train`, without prepared data: for `step.py` and `gpu.py`.

`step.py` starts this file as `python our_step.py FOLDER SETTINGS`, the latter as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contest
import jax
import jax.numpy as jnp
import numpy as np

from ddk_jax.config import Config
from ddk_jax.data.rows import HostBatch
from ddk_jax.losses.objective import PROMPT
from ddk_jax.models import hf
from ddk_jax.models.decoder import Decoder
from ddk_jax.plain import from_plain
from ddk_jax.planning.job import PlannedJob
from ddk_jax.training.memory import give_back
from ddk_jax.training.state import StepSums


def make_config(rows: int, seq_len: int, **sections: dict[str, Any]) -> Config:
    """A run with the loss and the optimizer of `contest.py`.

    Args:
      rows: of a step.
      seq_len: tokens that a row predicts.
      **sections: of the config; a section that is here as well is added to.
    """
    share, rate = contest.KL_SHARE, contest.LEARNING_RATE
    tree: dict[str, dict[str, Any]] = {
        "data": {"seq_len": seq_len, "dir": "no prepared data"},
        "objective": {
            "terms": [
                {"loss": "cross_entropy", "weight": 1 - share},
                {"loss": "forward_kl", "weight": share},
            ]
        },
        "optim": {
            "learning_rate": rate,
            "final_learning_rate": rate,
            "warmup_steps": 0,
            "beta1": contest.BETAS[0],
            "beta2": contest.BETAS[1],
            "eps": contest.EPS,
            "weight_decay": contest.WEIGHT_DECAY,
            "clip_norm": contest.CLIP_NORM,
        },
        "train": {"rows_per_step": rows},
        "evaluation": {"batch_rows": rows},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return from_plain(Config, tree)


def stepping(job: PlannedJob, teacher: Any, tokens: np.ndarray) -> Callable[[], StepSums]:
    """From the initial state on; what it returns takes a step, and returns when it is done.

    Args:
      job: of the config, on devices that are there.
      teacher: its parameters.
      tokens: int32 [B, T + 1], rows of one document each.
    """
    ones = np.ones_like(tokens)
    rows = HostBatch(tokens, ones, PROMPT * ones, np.zeros(len(tokens), np.int32))
    run, state, batch = job.train_step(), job.initial_state(), job.place(rows)
    frozen = job.frozen._replace(teachers=(teacher,))
    compiled = False

    def step() -> StepSums:
        nonlocal state, compiled
        state, sums = run(state, frozen, batch)
        if not compiled:
            give_back()  # as the loop does
            compiled = True
        jax.block_until_ready(state)
        return sums

    return step


def random_teacher(job: PlannedJob) -> Any:
    """Parameters of the teacher that the job describes."""
    (like,) = job.frozen.teachers
    model = Decoder(spec=job.teachers.specs[0])

    def init(key: Any) -> Any:
        return jax.tree.map(lambda leaf, as_: leaf.astype(as_.dtype), model.init(key), like)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(1))


def from_folder(folder: Path, settings: dict[str, dict[str, Any]]) -> Callable[[], float]:
    """The task of `contest.py`, in float32 on the CPU.

    Args:
      folder: of the task.
      settings: sections of the config to add to.
    """
    tokens = np.load(folder / contest.ROWS)
    paths = {name: folder / name for name in (contest.TEACHER, contest.STUDENT)}
    sections = {name: {"path": str(path)} for name, path in paths.items()}
    for name, section in settings.items():
        sections[name] = sections.get(name, {}) | section
    sections["run"] = {"compute_dtype": "float32"}
    config = make_config(len(tokens), tokens.shape[1] - 1, **sections)
    job = PlannedJob(config, tuple(jax.devices()[:1]))
    teacher = hf.load(paths[contest.TEACHER], spec=job.teachers.specs[0], dtype=jnp.float32)
    step = stepping(job, teacher, tokens)
    return lambda: float(step().loss)


if __name__ == "__main__":
    channel = contest.private_stdout()
    jax.config.update("jax_platforms", "cpu")
    contest.serve(from_folder(Path(sys.argv[1]), json.loads(sys.argv[2])), channel)
