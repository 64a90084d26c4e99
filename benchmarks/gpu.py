"""Tokens a second, MFU and peak memory of the train step on one GPU, in bfloat16.

    python benchmarks/gpu.py                       # Llama 3.2 1B -> 1B, 32 rows of 1,024 tokens
    python benchmarks/gpu.py --pair 7b-1b
    python benchmarks/gpu.py --tiny                # the same path with tiny models, on any device

Random weights and rows; the step of `ddk train`, with float32 master weights and moments. MFU is
the minimum of FLOPs (2 per teacher's and 6 per student's parameter and token, and causal attention;
nothing that is computed again) over the device's dense bfloat16 peak. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from our_step import make_config, random_teacher, stepping

from ddk_jax.config import Config
from ddk_jax.errors import UserError
from ddk_jax.models.spec import ModelSpec
from ddk_jax.plain import to_plain
from ddk_jax.planning.job import PlannedJob
from ddk_jax.planning.minimum import minimum_flops

LLAMA_1B = ModelSpec(
    vocab_size=128_256,
    hidden_size=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    ffn_size=8192,
    rope_theta=500_000.0,
)
"""Llama 3.2 1B."""
LLAMA_7B = ModelSpec(
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    ffn_size=11_008,
    tied_head=False,
)
"""The layers of Llama 2 7B over the vocabulary of the student."""
PAIRS = {"1b-1b": (LLAMA_1B, LLAMA_1B), "7b-1b": (LLAMA_7B, LLAMA_1B)}
"""Teacher and student."""
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 96,
}

PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("H200", 989.4),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
)
"""Dense bfloat16, by a part of the device's name, from NVIDIA's data sheets. The first that fits
counts."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the train step on one GPU."""

    pair: Literal["1b-1b", "7b-1b"] = "1b-1b"
    """Teacher and student."""
    rows: int = 32
    """Rows of a step."""
    seq_len: int = 1024
    """Tokens that a row predicts."""
    micro_rows: int = 0
    """Rows of one pass (`train.micro_rows`); 0: all of them. Less if memory runs out."""
    remat: str = "dots"
    """What the student's backward pass computes again (`student.remat`); `full` takes least
    memory."""
    logits_mib: float = 1200.0
    """Budget for logits (`objective.logits_mib`)."""
    round_logits: bool = True
    """Whether logits are kept in bfloat16 (`objective.round_logits`)."""
    warm_up: int = 3
    """Steps before any is timed; compilation is in the first."""
    repeats: int = 20
    """Timed steps."""
    peak_tflops: float = 0.0
    """Dense bfloat16 peak of the device, if this script does not know it."""
    tiny: bool = False
    """Tiny models and rows, on whatever device there is."""
    json: Path | None = None
    """Write the last line to this file as well."""


def device(options: Options) -> jax.Device:
    """The first GPU; of a tiny run, the first device.

    Raises:
      UserError: there is no GPU.
    """
    if options.tiny:
        return jax.devices()[0]
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        raise UserError(
            "jax finds no GPU: install the package with the extra `cuda` on a machine with one, "
            "or try --tiny"
        ) from error


def config_of(options: Options) -> Config:
    """What is trained, as a config."""
    teacher, student = PAIRS[options.pair]
    rows, seq_len = options.rows, options.seq_len
    if options.tiny:
        teacher, student = (replace(spec, **TINY) for spec in (teacher, student))
        rows, seq_len = min(rows, 4), min(seq_len, 32)
    return make_config(
        rows,
        seq_len,
        run={"compute_dtype": "bfloat16"},
        teacher={"path": "random weights", "spec": to_plain(teacher)},
        student={"spec": to_plain(student), "remat": options.remat},
        objective={"logits_mib": options.logits_mib, "round_logits": options.round_logits},
        train={"micro_rows": options.micro_rows, "rows_per_step": rows},
    )


def peak_flops(options: Options, kind: str) -> float:
    """Per second; 0 where it is not known."""
    known = (tflops for part, tflops in PEAK_TFLOPS if part in kind)
    return 1e12 * (options.peak_tflops or next(known, 0.0))


def measure(options: Options) -> dict[str, Any]:
    """Train a few steps, and say what they took.

    Raises:
      UserError: there is no GPU, its memory does not suffice, or an option cannot be meant.
    """
    where = device(options)
    try:
        return measure_on(where, options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"{where.device_kind} has too little memory for it: try --remat full, or --micro-rows 8"
        ) from error


def measure_on(where: jax.Device, options: Options) -> dict[str, Any]:
    """The same on a device that is there.

    Raises:
      JaxRuntimeError: its memory does not suffice.
    """
    config = config_of(options)
    job = PlannedJob(config, (where,))
    rows, length = config.train.rows_per_step, config.data.seq_len
    size = job.student.spec.vocab_size
    tokens = np.random.default_rng(0).integers(0, size, (rows, length + 1), np.int32)
    start = time.perf_counter()
    step = stepping(job, random_teacher(job), tokens)
    losses = [float(step().loss) for _ in range(options.warm_up)]
    ready = time.perf_counter() - start
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        sums = step()
        seconds.append(time.perf_counter() - start)
        losses.append(float(sums.loss))
    flops = minimum_flops(job.student.spec, job.teachers.specs, rows=rows, length=length)
    middle, peak = float(np.median(seconds)), peak_flops(options, where.device_kind)
    memory = where.memory_stats() or {}
    return {
        "pair": "tiny" if options.tiny else options.pair,
        "rows": rows,
        "seq_len": length,
        "device": where.device_kind,
        "versions": versions(where),
        "settings": {
            "micro_rows": job.micro_rows,
            "remat": options.remat,
            "logits_mib": options.logits_mib,
            "round_logits": options.round_logits,
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        },
        "tokens_per_second": rows * length / middle,
        "mfu": flops / middle / peak if peak else None,
        "minimum_flops": flops,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "device_bytes": memory.get("bytes_limit"),
        "seconds_until_ready": ready,
        "step_seconds": seconds,
        "losses": losses,
    }


def versions(where: jax.Device) -> dict[str, str]:
    """What the figures depend on."""
    import jaxlib

    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform": where.client.platform_version.replace("\n", " ").strip(),
    }


def described(found: dict[str, Any]) -> str:
    """The figures in a few lines."""
    low, middle, high = np.percentile(found["step_seconds"], [25, 50, 75])
    mfu, peak = found["mfu"], found["peak_bytes"]
    lines = [
        f"{found['device']}; {', '.join(f'{k} {v}' for k, v in found['versions'].items())}",
        f"{found['pair']}, {found['rows']} x {found['seq_len']} tokens: "
        f"{found['tokens_per_second']:,.0f} tokens/s, "
        f"step {middle:.3f} s ({low:.3f}-{high:.3f}), "
        + (f"MFU {mfu:.1%}" if mfu else "MFU not known (--peak-tflops)"),
        "peak memory " + (f"{peak / 2**30:.2f} GiB" if peak else "not told by this device"),
        f"loss {found['losses'][0]:.3f} -> {found['losses'][-1]:.3f}",
    ]
    return "\n".join(lines)


def main(options: Options) -> None:
    """Measure, print, save.

    Raises:
      UserError: as `measure`.
    """
    # By default jax takes three quarters of the memory. Read when the GPU is first used.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    found = measure(options)
    print(described(found))
    line = json.dumps(found)
    print(line)
    if options.json is not None:
        options.json.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
