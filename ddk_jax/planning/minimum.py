"""The FLOPs that a step cannot do without, by arithmetic: nothing computed twice, nothing masked.

A matrix costs 2 FLOPs per parameter and token in the forward pass and 4 in the backward pass: 2 N
for a teacher, 6 N for a student. N leaves out what is looked up, not multiplied: the embedding
table of a model that has a head of its own, norms, and biases.
"""

from __future__ import annotations

from collections.abc import Sequence

from ddk_jax.models.spec import ModelSpec


def matrix_parameters(spec: ModelSpec) -> int:
    """Parameters of all matrices that activations are multiplied by, the head among them."""
    E, H, K, D = spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_width
    attention = E * D * (H + 2 * K) + H * D * E
    mlp = (3 if spec.gated_mlp else 2) * E * spec.ffn_size
    return spec.num_layers * (attention + mlp) + spec.vocab_size * E


def attention_flops(spec: ModelSpec, length: int) -> int:
    """FLOPs of the scores and of their products with the values, forward, for one row.

    Every query sees the tokens up to itself, in `local` layers the last `window` of them.

    Args:
      spec: the model.
      length: tokens of the row, one document.
    """
    total = 0
    for layer in range(spec.num_layers):
        kind = spec.pattern[layer % len(spec.pattern)]
        window = min(spec.window, length) if kind == "local" else length
        seen = window * (window + 1) // 2 + (length - window) * window
        total += 2 * 2 * seen * spec.num_heads * spec.head_width
    return total


def visible_share(specs: Sequence[ModelSpec], length: int) -> float:
    """The part of all pairs of tokens that the masks of some models leave, weighed by their work.

    Args:
      specs: the models.
      length: tokens of a row.
    """
    all_pairs = sum(
        4 * length**2 * spec.num_layers * spec.num_heads * spec.head_width for spec in specs
    )
    return sum(attention_flops(spec, length) for spec in specs) / all_pairs


def minimum_flops(
    student: ModelSpec,
    teachers: Sequence[ModelSpec],
    *,
    rows: int,
    length: int,
    student_passes: int = 3,
) -> int:
    """FLOPs of a step, over all chips.

    Args:
      student: its shape.
      teachers: theirs; none if the objective reads none.
      rows: of the step.
      length: tokens that a row predicts.
      student_passes: 3 where all of the student learns, 2 where only adapters do (gradients of the
        activations, not of the matrices), 1 where it is frozen.
    """

    def forward(spec: ModelSpec) -> int:
        return 2 * matrix_parameters(spec) * length + attention_flops(spec, length)

    return rows * (student_passes * forward(student) + sum(map(forward, teachers)))
