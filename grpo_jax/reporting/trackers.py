"""Writes numbers and completions: always JSON lines, on request TensorBoard and W&B.

Every tracker takes the same calls in the order of the steps. Only process 0 of a run
has trackers; the other processes get an empty composite.
"""

import contextlib
import importlib
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from grpo_jax.config import ReportConfig
from grpo_jax.config.files import to_json_line, to_jsonable, write_text
from grpo_jax.reporting._run_files import completion_steps, completions_file, read_lines
from grpo_jax.reporting.metrics import METRICS_FILE
from grpo_jax.reporting.text import readable_text

# Counts of a conversation with tools or an environment, columns of the table of W&B.
_OF_EPISODES = ("turns", "calls")
# Completions of one step that TensorBoard shows; all of them are in the JSON lines.
_SHOWN = 4


class Tracker(Protocol):
    """A destination of numbers and completions."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record the metrics of one step; called once per step."""
        ...

    def log_completions(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Record completions of one step, a row each; fields as `_JsonlTracker` has."""
        ...

    def flush(self) -> None:
        """Return once everything recorded so far survives the end of the process."""
        ...

    def truncate_after(self, step: int) -> None:
        """Forget what was recorded for steps after `step`; -1 forgets everything.

        A resumed run calls it before its first step, with the step it restored.
        """
        ...

    def close(self) -> None:
        """Flush and release files and connections."""
        ...


def make_tracker(
    config: ReportConfig, run_dir: str | Path, *, enabled: bool = True
) -> Tracker:
    """All trackers that `config` enables, as one; none when not `enabled`.

    Raises ValueError if a package is not installed. So make trackers before anything
    slow starts.
    """
    if not enabled:
        return _CompositeTracker(())
    optional: list[Tracker] = []
    if config.tensorboard:
        optional.append(_TensorBoardTracker(run_dir))
    if config.wandb:
        optional.append(_WandbTracker(run_dir))
    return _CompositeTracker((_JsonlTracker(run_dir), *optional))


class _JsonlTracker:
    """Writes `metrics.jsonl`, one line per step, and `completions/step_*.jsonl`.

    A row of completions has `step`, `prompt`, `completion`, `rewards` (by name),
    `reward`, `advantage`, `length` and `finished`.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._path = self._run_dir / METRICS_FILE
        self._file = self._path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Append one line; readers see it at once."""
        line = to_json_line({**metrics, "step": step})
        self._file.write(line + "\n")
        self._file.flush()

    def log_completions(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Write the file of this step, whole or not at all."""
        path = completions_file(self._run_dir, step)
        path.parent.mkdir(exist_ok=True)
        write_text(path, "".join(to_json_line(row) + "\n" for row in rows))

    def flush(self) -> None:
        """Put the lines on disk: a checkpoint must not be newer than its metrics."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Drop lines, a torn one too, and completions of later steps, atomically."""
        kept = [line for line in read_lines(self._path) if line["step"] <= step]
        self._file.close()
        write_text(self._path, "".join(to_json_line(line) + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        for written in completion_steps(self._run_dir):
            if written > step:
                completions_file(self._run_dir, written).unlink()

    def close(self) -> None:
        """Flush and close the file of metrics."""
        if not self._file.closed:
            self.flush()
            self._file.close()


class _TensorBoardTracker:
    """Writes event files under `tensorboard/` of the run; needs tensorboardX."""

    def __init__(self, run_dir: str | Path) -> None:
        try:
            import tensorboardX
        except ImportError as error:
            raise ValueError(_missing("tensorboard", "tensorboardX")) from error
        self._writer_type = tensorboardX.SummaryWriter
        self._log_dir = str(Path(run_dir) / "tensorboard")
        self._purge_step: int | None = None
        self._open_writer: Any = None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add every metric that is a number."""
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, step)

    def log_completions(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Add the first few as text, indented so that Markdown leaves it as it is."""
        for index, row in enumerate(rows[:_SHOWN]):
            pieces = (
                f"reward {row['reward']}",
                readable_text(row["prompt"]),
                readable_text(row["completion"]),
            )
            lines = "\n---\n".join(pieces).split("\n")
            block = "\n".join(f"    {line}" for line in lines)
            self._writer.add_text(f"completions/{index}", block, step)

    def flush(self) -> None:
        """Write the event file out."""
        if self._open_writer is not None:
            self._open_writer.flush()

    def truncate_after(self, step: int) -> None:
        """Begin an event file that hides the later steps of earlier files."""
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        """Write and close the event file."""
        if self._open_writer is not None:
            self._open_writer.close()
            self._open_writer = None

    @property
    def _writer(self) -> Any:
        # Opened at the first write, so that no empty file is left.
        if self._open_writer is None:
            self._open_writer = self._writer_type(
                self._log_dir,
                purge_step=self._purge_step,
                # tensorboardX names files by the second; two could be the same.
                filename_suffix=f".{time.time_ns()}",
            )
        return self._open_writer


class _WandbTracker:
    """Logs to Weights & Biases; with WANDB_MODE=offline into the run directory."""

    def __init__(self, run_dir: str | Path) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ValueError(_missing("wandb", "wandb")) from error
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # The id of this run at W&B stays the same after a restart.
        id_file = folder / "wandb_id.txt"
        if not id_file.exists():
            write_text(id_file, uuid.uuid4().hex[:12])
        self._make_table = wandb.Table
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "grpo_jax"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            dir=str(folder),
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
        )

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send every metric that is a number."""
        self._run.log(_numbers(metrics), step=step)

    def log_completions(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Send a table of prompts, completions and rewards, a column per function."""
        scores = list(rows[0]["rewards"]) if rows else []
        fields = ["reward", "advantage", "length", "finished"]
        fields += [name for name in _OF_EPISODES if any(name in row for row in rows)]
        columns = ["step", "prompt", "completion"]
        columns += [f"rewards/{name}" for name in scores] + fields
        data = [
            [row["step"], *(readable_text(row[name]) for name in columns[1:3])]
            + [row["rewards"][name] for name in scores]
            + [row.get(field) for field in fields]
            for row in rows
        ]
        self._run.log(
            {"completions": self._make_table(columns=columns, data=data)}, step=step
        )

    def flush(self) -> None:
        """Do nothing: W&B writes and sends in a process of its own."""

    def truncate_after(self, step: int) -> None:
        """Do nothing: W&B keeps a step's first value, and a rerun gives the same."""

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


class _CompositeTracker:
    """Passes every call on to several trackers; with none of them it does nothing."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record the metrics of one step everywhere."""
        for tracker in self._trackers:
            tracker.log(metrics, step)

    def log_completions(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Record completions everywhere."""
        for tracker in self._trackers:
            tracker.log_completions(rows, step)

    def flush(self) -> None:
        """Flush all."""
        for tracker in self._trackers:
            tracker.flush()

    def truncate_after(self, step: int) -> None:
        """Forget later steps everywhere."""
        for tracker in self._trackers:
            tracker.truncate_after(step)

    def close(self) -> None:
        """Close all, even when one of them fails."""
        with contextlib.ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.close)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    plain = to_jsonable(metrics)
    return {
        name: value
        for name, value in plain.items()
        if name != "step" and isinstance(value, int | float)
    }


def _missing(field: str, package: str) -> str:
    return (
        f"report.{field}=True needs {package}, which is not installed; run"
        f" pip install 'grpo-jax[{field}]', or leave report.{field} out"
    )
