"""A `ddk` that takes no time: `train` writes checkpoint after checkpoint, to the third one.

With the file `hold` in the world, it waits after the first one; SIGTERM makes it save and end.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

WORLD = Path(os.environ["FAKE_CLOUD"])
LAST = 3


def train(run_dir: Path) -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    checkpoints = run_dir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    step = max((int(path.name) for path in checkpoints.iterdir()), default=0)
    print(f"continuing from {step}", flush=True)
    while step < LAST:
        step += 1
        (checkpoints / str(step)).mkdir(exist_ok=True)
        while (WORLD / "hold").exists() and not stopped:
            time.sleep(0.01)
        if not Path(os.environ["HOME"]).exists():
            return 137  # the machine is gone
        if stopped:
            print(f"stopped and saved at step {step}", flush=True)
            return 0
    (run_dir / "summary.json").write_text("{}")
    return 0


if __name__ == "__main__":
    command, _, option, place, *_ = sys.argv[1:]
    assert option == "--run.dir"
    path = Path(place) if place.startswith("/") else WORLD / "gs" / place.removeprefix("gs://")
    print(" ".join(sys.argv[1:]), os.environ.get("LIBTPU_INIT_ARGS", ""), flush=True)
    sys.exit(train(path) if command == "train" else 0)
