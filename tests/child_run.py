"""A run in a process of its own, which is killed at a moment of its own life.

    python child_run.py CONFIG [MOMENT DELAY]

MOMENT is how a log line starts, or `writing STEP`: while the checkpoint of that step is written in
the background. DELAY, in seconds, is counted from then; 0 is in the midst of that very call.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from ddk_jax.config import load_config
from ddk_jax.errors import UserError
from ddk_jax.training import checkpoint
from ddk_jax.training.loop import train


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAtLine(logging.Handler):
    """Kills the process when a log line starts like `moment`."""

    def __init__(self, moment: str, delay: float) -> None:
        super().__init__()
        self.moment, self.delay = moment, delay

    def emit(self, record: logging.LogRecord) -> None:
        if not record.getMessage().startswith(self.moment):
            return
        if self.delay:
            threading.Timer(self.delay, kill_self).start()
        else:
            kill_self()


def kill_while_writing(step: int) -> None:
    original = checkpoint.ocp.save_checkpointables_async

    def save(path: str, *args: Any, **kwargs: Any) -> Any:
        response = original(path, *args, **kwargs)
        if path.endswith(f"/{step}"):
            while not any(Path(path).parent.glob(f"{step}.*")):  # under its temporary name
                pass
            kill_self()
        return response

    checkpoint.ocp.save_checkpointables_async = save


def main() -> int:
    logger = logging.getLogger("ddk_jax")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    if len(sys.argv) > 2:
        moment, delay = sys.argv[2], float(sys.argv[3])
        if moment.startswith("writing "):
            kill_while_writing(int(moment.removeprefix("writing ")))
        else:
            logger.addHandler(KillAtLine(moment, delay))
    try:
        train(load_config(sys.argv[1]))
    except UserError as error:
        print(error, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
