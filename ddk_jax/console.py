"""What a command shows of the log: on standard error, beside the progress bar."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class _Handler(logging.Handler):
    """Messages on standard error, above the progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        tqdm.write(level + record.getMessage(), file=sys.stderr)


@contextmanager
def console() -> Iterator[None]:
    """Show what the package logs, and of other packages only what went wrong."""
    logger, handler = logging.getLogger("ddk_jax"), _Handler()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for name in ("absl", "jax", "orbax", "grain"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they speak to programmers
            yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
