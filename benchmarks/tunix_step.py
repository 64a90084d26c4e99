"""A distillation step of Tunix's `DistillationTrainer`, for `step.py` to compare with.

It runs in an environment of Tunix's own (`step.py` makes it), which need not have this package:

    python tunix_step.py FOLDER                     # take steps on the CPU
    python tunix_step.py FOLDER ROWS LENGTH v5e O1  # compile them for an absent TPU chip
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contest
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.distillation.distillation_trainer import (
    DistillationTrainer,
    TrainingConfig,
    TrainingInput,
)
from tunix.distillation.strategies.logit import LogitStrategy
from tunix.models.llama3.model import Llama3, ModelConfig, RematConfig
from tunix.models.llama3.params import create_model_from_safe_tensors


def forward(model: Any, input_tokens: Any, positions: Any, attention_mask: Any, **_: Any) -> Any:
    """Logits [B, T, V]."""
    return model(input_tokens, positions, None, attention_mask)[0]


def strategy_for(vocab_size: int) -> LogitStrategy:
    """The loss of the task; it takes labels as one-hot vectors."""
    return LogitStrategy(
        student_forward_fn=forward,
        teacher_forward_fn=forward,
        labels_fn=lambda labels, **_: jax.nn.one_hot(labels, vocab_size),
        temperature=1.0,
        alpha=contest.KL_SHARE,
    )


def model_inputs(rows: Any) -> dict[str, Any]:
    """Inputs and labels from rows of T + 1 tokens; one document a row."""
    tokens = rows.input_tokens[:, :-1]
    B, T = tokens.shape
    causal = jnp.tril(jnp.ones((T, T), bool))
    return {
        "input_tokens": tokens,
        "positions": jnp.broadcast_to(jnp.arange(T), (B, T)),
        "attention_mask": jnp.broadcast_to(causal, (B, T, T)),
        "labels": rows.input_tokens[:, 1:],
    }


def optimizer() -> optax.GradientTransformation:
    """AdamW after clipping; vectors are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(contest.CLIP_NORM),
        optax.adamw(
            contest.LEARNING_RATE,
            *contest.BETAS,
            eps=contest.EPS,
            weight_decay=contest.WEIGHT_DECAY,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )


def read_config(directory: Path, **changes: Any) -> ModelConfig:
    """Tunix's description of a Llama in a Hugging Face directory."""
    found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return ModelConfig(
        num_layers=found["num_hidden_layers"],
        vocab_size=found["vocab_size"],
        embed_dim=found["hidden_size"],
        hidden_dim=found["intermediate_size"],
        num_heads=found["num_attention_heads"],
        head_dim=found["hidden_size"] // found["num_attention_heads"],
        num_kv_heads=found["num_key_value_heads"],
        rope_theta=1_000_000,  # whatever stands here: the model rotates by this one
        norm_eps=found["rms_norm_eps"],
        weight_tying=found["tie_word_embeddings"],
        **changes,
    )


def make_trainer(student: Any, teacher: Any, vocab_size: int) -> DistillationTrainer:
    """The trainer, without a place for checkpoints."""
    made = DistillationTrainer(
        student,
        teacher,
        strategy_for(vocab_size),
        optimizer(),
        TrainingConfig(eval_every_n_steps=1_000_000, pbar_description=None),
    )
    return made.with_gen_model_input_fn(model_inputs)


def from_folder(folder: Path) -> Callable[[], float]:
    """Load both models; what it returns takes a step and returns the loss.

    Args:
      folder: of the task (`contest.py`).
    """
    models = {}
    for name in (contest.TEACHER, contest.STUDENT):
        config = read_config(folder / name)
        models[name] = create_model_from_safe_tensors(str(folder / name), config, dtype=jnp.float32)
    teacher = models[contest.TEACHER]
    trainer = make_trainer(models[contest.STUDENT], teacher, config.vocab_size)
    train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)  # as its loop does
    tokens = np.load(folder / contest.ROWS)
    rows = TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens))

    def step() -> float:
        targets = trainer.strategy.get_teacher_outputs(teacher, model_inputs(rows))
        found = train_step(rows.replace(teacher_output=targets))
        return float(jax.block_until_ready(found)[0])

    return step


def shapes(config: ModelConfig) -> tuple[Any, Any]:
    """A model and its optimizer in bfloat16, each as graph and state, with shapes as arrays."""

    def build() -> Any:
        model = Llama3(config, rngs=nnx.Rngs(0))
        halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param))
        nnx.update(model, halved)
        return model, nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

    model, update = nnx.eval_shape(build)
    return nnx.split(model), nnx.split(update)


def programs(folder: Path, rows: int, length: int, place: Callable[[Any], Any]) -> dict[str, Any]:
    """The two programs that a step consists of, traced, and what lies on the chip besides.

    Weights, moments and activations are bfloat16, decoder layers are rematerialised. The programs
    are the functions that the trainer jits, with its donation; models and rows are shapes.

    Args:
      folder: of the task; of its models only the configs are read.
      rows: of a step.
      length: tokens that a row predicts.
      place: gives shapes their sharding.
    """
    config = read_config(folder / contest.STUDENT, remat_config=RematConfig.DECODER)
    small = dataclasses.replace(config, num_layers=1, vocab_size=8, embed_dim=8, hidden_dim=8)
    models = [Llama3(small, rngs=nnx.Rngs(0)) for _ in range(2)]  # a trainer must have some
    trainer = make_trainer(*models, config.vocab_size)
    train_step = trainer.create_train_step_fn()
    (teacher_graph, teacher), _ = shapes(read_config(folder / contest.TEACHER))
    (graph, student), (moment_graph, moments) = shapes(config)

    def teach(state: Any, tokens: Any) -> Any:
        inputs = model_inputs(TrainingInput(input_tokens=tokens, input_mask=tokens))
        return trainer.strategy.get_teacher_outputs(nnx.merge(teacher_graph, state), inputs)

    def train(state: Any, moments: Any, tokens: Any, targets: Any) -> Any:
        model, update = nnx.merge(graph, state), nnx.merge(moment_graph, moments)
        batch = TrainingInput(input_tokens=tokens, input_mask=tokens, teacher_output=targets)
        found = train_step(model, update, batch)
        return found, nnx.state(model), nnx.state(update)

    tokens = place(jax.ShapeDtypeStruct((rows, length + 1), jnp.int32))
    teacher, student, moments = place(teacher), place(student), place(moments)
    targets = place(jax.eval_shape(teach, teacher, tokens))
    train_program = jax.jit(train, donate_argnums=1).trace(student, moments, tokens, targets)
    return {
        "teacher": (jax.jit(teach).trace(teacher, tokens), (student, moments)),
        "train": (train_program, teacher),
    }


def compiled(folder: Path, rows: int, length: int, chip: str, level: Any) -> dict[str, Any]:
    """What the TPU compiler says of the `programs` on one chip.

    Args:
      folder: as for `programs`.
      rows: likewise.
      length: likewise.
      chip: such as `v5e`.
      level: how hard the compiler tries.
    """
    from compiled_step import figures

    from ddk_jax.parallel.compiled import topology

    mesh = jax.make_mesh((1,), ("chips",), devices=topology(f"{chip}:1x1")[:1])
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), tree
        )

    found: dict[str, Any] = {"resident_bytes": {}}
    for name, (program, others) in programs(folder, rows, length, place).items():
        # Without kernels, whose blocks and heads would count.
        found[name] = figures(program, chip, level, visible=1, head_width=128)._asdict()
        sizes = (leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(others))
        found["resident_bytes"][name] = sum(sizes)
    return found


if __name__ == "__main__":
    channel = contest.private_stdout()
    jax.config.update("jax_platforms", "cpu")
    where, *wanted = sys.argv[1:]
    if wanted:
        num_rows, num_tokens, *rest = wanted
        channel.write(json.dumps(compiled(Path(where), int(num_rows), int(num_tokens), *rest)))
        channel.close()
    else:
        contest.serve(from_folder(Path(where)), channel)
