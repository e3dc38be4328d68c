"""The library's logger, `grpo_jax`, and the file `log.txt` of a run."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from grpo_jax.reporting.text import escape_control_chars

LOGGER = logging.getLogger("grpo_jax")


@contextlib.contextmanager
def attach_log_file(run_dir: str | Path) -> Iterator[Path]:
    """Appends what is logged inside `with` to `log.txt` of the run; gives its path."""
    path = Path(run_dir) / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_VisibleFormatter("%(asctime)s %(levelname)s %(message)s"))
    with contextlib.closing(handler), attached(handler):
        yield path


@contextlib.contextmanager
def attached(handler: logging.Handler) -> Iterator[None]:
    """Gives the library's logger one more handler, and lets information through.

    Other libraries put handlers on the root logger; what is shown here must not be
    shown there again.
    """
    level, propagates = LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.propagate = False
    if LOGGER.getEffectiveLevel() > logging.INFO:
        LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagates


class _VisibleFormatter(logging.Formatter):
    """Formats records so that reading the file in a terminal is safe."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line, with the lines of its exception if it has one."""
        return escape_control_chars(super().format(record))
