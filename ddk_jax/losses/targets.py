"""What the teacher says about a batch, in the form that the loss machinery reads."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float


class TeacherTargets(NamedTuple):
    """A teacher that runs live: its logits are made chunk by chunk, beside the student's.

    No gradient flows into either field.
    """

    hidden: Float[Array, "B T E_t"]
    """Normed final hidden states of the teacher."""
    head: Float[Array, "E_t V"]
    """Its LM head."""
