"""Notices environments that answer a repeated step otherwise than before.

A run that is killed repeats the steps after its last checkpoint, and draws the same
tokens again. If what the environments answer differs then, the run cannot end in the
bits of one that was never stopped.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from grpo_jax.config.files import write_text
from grpo_jax.parallel import mesh as meshes

_FILE = "episodes.jsonl"


class Repeats:
    """Keeps a digest of the answers of each step in the run directory."""

    def __init__(
        self, path: Path, *, report: Callable[[str], None], enabled: bool
    ) -> None:
        """Digests of a run in `path`.

        Args:
          report: receives the warning, once.
          enabled: whether this process writes.
        """
        self._path, self._report, self._enabled = path / _FILE, report, enabled
        self._known: dict[int, str] = {}
        if enabled and self._path.is_file():
            # A killed run may have left its last line unfinished.
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            if len(whole) < len(lines):
                write_text(self._path, "".join(whole))
            for line in whole:
                with contextlib.suppress(ValueError):  # damaged: nothing to compare
                    entry = json.loads(line)
                    self._known[entry["step"]] = entry["sha256"]

    def check(self, step: int, digest: str) -> None:
        """Compare a step with the time before, if there was one; all processes call it.

        Args:
          digest: of this process's episodes; "" without environments.
        """
        digests = meshes.gather_lists([digest])
        if not self._enabled or not any(digests):
            return
        new = hashlib.sha256("".join(digests).encode()).hexdigest()
        before = self._known.get(step)
        if before is not None and before != new:
            self._report(
                f"step {step} was repeated, and its tools or environments answered "
                "otherwise than before. They do not repeat themselves, so this run may "
                "end differently from one that was never interrupted"
            )
            self._known.clear()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "sha256": new}) + "\n")
