"""Shows a run while it goes on: a live display, or plain lines in a log.

Everything passes through the library's logger. So records of other modules appear here
too, and `logs.attach_log_file` also writes all of it to `log.txt`.
"""

import contextlib
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import rich.console
import rich.live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_jax.config import ReportConfig, TrainConfig
from grpo_jax.config.files import to_jsonable
from grpo_jax.reporting import logs
from grpo_jax.reporting.metrics import (
    ACCURACY,
    CALLS,
    CLIPPED_RATIO,
    EVAL_REWARD,
    GRAD_NORM,
    KL,
    MEAN_LENGTH,
    REWARD,
    TOKENS_PER_SECOND,
    TURNS,
)
from grpo_jax.reporting.text import (
    Messages,
    duration_text,
    escape_control_chars,
    readable_text,
)

# The logger of lines about single steps. A live display draws those itself.
_PROGRESS = logs.LOGGER.getChild("progress")

# Name on the screen, metric, format.
_SHOWN = (
    ("reward", REWARD, "{:.3f}"),
    ("accuracy", ACCURACY, "{:.1%}"),
    ("held-out reward", EVAL_REWARD, "{:.3f}"),
    ("kl", KL, "{:.4f}"),
    ("length", MEAN_LENGTH, "{:.1f}"),
    ("cut", CLIPPED_RATIO, "{:.0%}"),
    ("turns", TURNS, "{:.2f}"),
    ("calls", CALLS, "{:.2f}"),
    ("grad", GRAD_NORM, "{:.3g}"),
    ("tok/s", TOKENS_PER_SECOND, "{:,.0f}"),
)
_SAMPLE_SECONDS = 3.0  # the shortest time that a sample stays, so that it can be read
_SAMPLE_LINES = 6  # of the prompt, and of the completion


class Console:
    """Shows a run's progress inside `with`; with `enabled=False` it shows nothing.

    In a terminal: step, metrics, time left and a sample completion, redrawn in place.
    Elsewhere, and where the variable CI is set: one short line every `log_every` steps.
    Processes other than the first pass `enabled=False`.
    """

    def __init__(
        self,
        total_steps: int,
        config: ReportConfig,
        *,
        stream: TextIO | None = None,
        enabled: bool = True,
    ) -> None:
        self._total = total_steps
        self._every = config.log_every
        self._enabled = enabled
        self._stream = stream or sys.stdout
        self._screen = rich.console.Console(file=self._stream)
        self._clock = _Clock(total_steps)
        self._latest: dict[str, Any] = {}
        self._step = 0
        self._phases: set[str] = set()
        self._sample: Panel | None = None
        self._sample_time = -math.inf
        self._live: rich.live.Live | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._enabled:
            if is_terminal(self._stream):
                self._live = rich.live.Live(
                    console=self._screen, get_renderable=self._display
                )
                self._live.__enter__()
                self._open.push(self._live)
            self._open.enter_context(logs.attached(_ScreenHandler(self)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def start_at(self, step: int) -> None:
        """Show where a resumed run stands, before its next step has ended."""
        self._step = step

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step."""
        if not self._enabled:
            return
        self._step = step
        # Merged, so that an evaluation stays on display until the next one. A new dict,
        # because the thread that redraws may be reading the old one.
        self._latest = self._latest | to_jsonable(metrics)
        self._clock.tick(step)
        if step % self._every == 0 or step in (1, self._total):
            _PROGRESS.info(self._line(metrics))

    def sample(
        self,
        prompt: Messages,
        completion: Messages,
        rewards: Mapping[str, float | None],
    ) -> None:
        """Show a completion with its rewards by name, on a live display only."""
        now = time.monotonic()
        if self._live is None or now < self._sample_time + _SAMPLE_SECONDS:
            return
        self._sample_time = now
        scores = "  ".join(
            f"{name} {'none' if value is None else format(value, '.3g')}"
            for name, value in rewards.items()
        )
        body = Text()
        body.append(_last_lines(readable_text(prompt)) + "\n", style="dim")
        body.append(_last_lines(readable_text(completion)) + "\n")
        body.append(escape_control_chars(scores), style="bold")
        # The title names the step, because the sample stays while further steps end.
        title = Text(f"a completion of step {self._step}")
        self._sample = Panel(body, title=title, title_align="left")

    def note(self, text: str) -> None:
        """Show a line of information."""
        if self._enabled:
            logs.LOGGER.info(text)

    def phase(self, text: str) -> None:
        """Show the name of a phase, once: only its first time has to be compiled."""
        if text not in self._phases:
            self._phases.add(text)
            self.note(text)

    def warning(self, text: str) -> None:
        """Show a line that should not be missed."""
        if self._enabled:
            logs.LOGGER.warning(text)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Show the end of the run, a line per value that is neither None nor NaN.

        The live display stops here.
        """
        if not self._enabled:
            return
        if self._live is not None:
            self._live.stop()
        plain = to_jsonable(values)
        known = {name: value for name, value in plain.items() if value is not None}
        width = max(map(len, known), default=0)
        for name, value in known.items():
            text = str(value)
            if isinstance(value, float):
                seconds = name == "seconds"
                text = duration_text(value) if seconds else f"{value:.4g}"
                text = f"{value:.1%}" if "accuracy" in name else text
            logs.LOGGER.info(f"{name:<{width}}  {text}")

    def show(self, record: logging.LogRecord) -> None:
        """Write one record of the logger to the stream."""
        if self._live is not None and record.name == _PROGRESS.name:
            return
        warns = record.levelno >= logging.WARNING
        message = escape_control_chars(record.getMessage())
        if warns:
            message = f"{record.levelname.lower()}: {message}"
        if self._live is not None:
            # Text, not str: in a str rich would obey markup such as [/INST].
            style = "bold yellow" if warns else ""
            self._screen.print(Text(message, style=style), soft_wrap=True)
            return
        encoding = self._stream.encoding or "utf-8"
        safe = message.encode(encoding, "backslashreplace").decode(encoding)
        try:
            self._stream.write(safe + "\n")
            self._stream.flush()
        except OSError:
            self._drop_stream()

    def _drop_stream(self) -> None:
        """Go on without a reader, as after `| head`: the run must not fail with it.

        The stream's buffer is flushed at the end of the program and would fail then. So
        its file descriptor becomes that of the null device.
        """
        nowhere = self._open.enter_context(open(os.devnull, "w"))
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere.fileno(), self._stream.fileno())
        self._stream = nowhere

    def _line(self, metrics: Mapping[str, Any]) -> str:
        values = [f"{label} {text}" for label, text in _formatted(metrics)]
        left = self._clock.left()
        ending = [f"left {duration_text(left)}"] if left is not None else []
        return "  ".join([f"step {self._step}/{self._total}", *values, *ending])

    def _display(self) -> rich.console.Group:
        """The live display; drawn again several times a second, so that time passes."""
        left = self._clock.left()
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"step {self._step}/{self._total}", style="bold"),
            ProgressBar(total=self._total, completed=self._step, width=40),
            Text(f"{duration_text(self._clock.elapsed())} so far"),
            Text("" if left is None else f"{duration_text(left)} left"),
        )
        parts: list[Table | Panel] = [bar]
        if self._latest:
            shown = _formatted(self._latest)
            table = Table.grid(padding=(0, 3))
            table.add_row(*(Text(label, style="dim") for label, _ in shown))
            table.add_row(*(Text(text, style="bold") for _, text in shown))
            parts.append(table)
        if self._sample is not None:
            parts.append(self._sample)
        return rich.console.Group(*parts)


def next_commands(
    run_dir: Path | str, config: TrainConfig, *, played: Sequence[str] = ()
) -> str:
    """The commands for a run that has ended, one per line.

    Args:
      played: the flags of its tools and environment, which the run does not store.
    """
    folder = shlex.quote(str(run_dir))
    best = " --step best" if config.checkpoint.keep_best else ""
    adapter = "" if config.lora.rank is None else " --adapter"
    again = "".join(f" {shlex.quote(word)}" for word in played)
    lines = (
        f"eval --run-dir {folder}{best}{again}",
        f"sample --run-dir {folder}{best} --prompt TEXT{again}",
        f"report {folder}",
        f"export --run-dir {folder}{best}{adapter} --out FOLDER",
        *([f"chat --run-dir {folder}{best}{again}"] if played else []),
    )
    return "\n  grpo-jax ".join(("next:", *lines))


class _ScreenHandler(logging.Handler):
    """Hands the logger's records to a console."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Show the record."""
        self._console.show(record)


class _Clock:
    """Estimates the time left from the steps after the first, which compiles."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._start = time.monotonic()
        # The first step that ended here, and the time.
        self._first: tuple[int, float] | None = None
        self._latest = (0, self._start)

    def tick(self, step: int) -> None:
        """Record the end of `step`; step 0 is an evaluation and does not count."""
        if step == 0:
            return
        self._latest = (step, time.monotonic())
        if self._first is None:
            self._first = self._latest

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def left(self) -> float | None:
        """Seconds to the end at the speed so far; None before two steps are done."""
        if self._first is None or self._latest[0] <= self._first[0]:
            return None
        steps = self._latest[0] - self._first[0]
        seconds = self._latest[1] - self._first[1]
        return (self._total - self._latest[0]) * seconds / steps


def is_terminal(stream: TextIO) -> bool:
    """Whether a person reads the stream: not a file, a pipe or a CI job."""
    dumb = os.environ.get("TERM", "") in ("", "dumb")
    return stream.isatty() and not dumb and not os.environ.get("CI")


def _formatted(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of the metrics in `_SHOWN` that are present."""
    plain = to_jsonable(metrics)
    return [
        (label, "-" if plain[name] is None else form.format(plain[name]))
        for label, name, form in _SHOWN
        if name in plain
    ]


def _last_lines(text: str) -> str:
    """The end of a long text: there a prompt asks and a completion answers."""
    lines = text.expandtabs(4).strip("\n").split("\n")
    cut = ["..."] if len(lines) > _SAMPLE_LINES else []
    lines = cut + lines[-_SAMPLE_LINES:]
    return "\n".join(line if len(line) <= 400 else line[:397] + "..." for line in lines)
