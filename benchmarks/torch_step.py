"""A distillation step as one writes it with torch and transformers: eager, float32, on the CPU.

What `step.py` compares with; it starts this file as `python torch_step.py FOLDER THREADS`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import contest
import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM


def make_step(folder: Path) -> Callable[[], float]:
    """Load both models; what it returns takes a step and returns the loss.

    Args:
      folder: of the task (`contest.py`).
    """
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in (contest.TEACHER, contest.STUDENT)
    )
    teacher.eval()
    student.train()
    tokens = torch.from_numpy(np.load(folder / contest.ROWS).astype(np.int64))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": contest.WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=contest.LEARNING_RATE,
        betas=contest.BETAS,
        eps=contest.EPS,
        fused=True,
    )

    def step() -> float:
        with torch.no_grad():
            teacher_logits = teacher(inputs, use_cache=False).logits.flatten(0, 1)
        logits = student(inputs, use_cache=False).logits.flatten(0, 1)
        divergence = F.kl_div(
            F.log_softmax(logits, dim=-1),
            F.log_softmax(teacher_logits, dim=-1),
            log_target=True,
            reduction="batchmean",
        )
        cross_entropy = F.cross_entropy(logits, labels.flatten())
        loss = contest.KL_SHARE * divergence + (1 - contest.KL_SHARE) * cross_entropy
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), contest.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


if __name__ == "__main__":
    channel = contest.private_stdout()
    torch.set_num_threads(int(sys.argv[2]))
    contest.serve(make_step(Path(sys.argv[1])), channel)
