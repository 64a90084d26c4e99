"""One of the processes of a run, or the only one, on simulated CPU devices.

    python child_processes.py CONFIG DEVICES ROWS PACE

Which of several it is, and where the others are, the environment says (DDK_...). Logs go to
standard output. ROWS is a file that gets the rows of every step that this process has read: a line
with the step, and a digest of each by its number in the batch. PACE: seconds that a step takes at
least, for tests that meet a run in its middle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny

from ddk_jax.config import load_config
from ddk_jax.data.pipeline import MixturePipeline
from ddk_jax.errors import UserError
from ddk_jax.training.loop import train


def watch_rows(file: Path, pace: float) -> None:
    """Write down the rows that are not padding, whenever the loop takes a batch."""
    original = MixturePipeline.__next__

    def watched(pipeline: MixturePipeline) -> Any:
        time.sleep(pace)
        batch, state = original(pipeline)
        rows = {
            str(row): hashlib.sha256(
                b"".join(x[row].tobytes() for x in (batch.tokens, batch.segment_ids, batch.role))
            ).hexdigest()
            for row in np.flatnonzero(batch.role.any(axis=1))
        }
        with file.open("a") as out:
            out.write(json.dumps([state["next_row"] // tiny.ROWS, rows]) + "\n")
        return batch, state

    MixturePipeline.__next__ = watched


def main() -> int:
    """Train, and return the exit code."""
    config, devices, rows, pace = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_disable_most_optimizations", True)
    logger = logging.getLogger("ddk_jax")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    watch_rows(Path(rows), float(pace))
    try:
        train(load_config(config))
    except UserError as error:
        print(error, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
