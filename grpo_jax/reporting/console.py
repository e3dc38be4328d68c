"""What a person sees while a run goes on: a live display, or plain lines in a log.

Everything passes through the library's logger, so that records of other modules appear
here too, and all of it in `log.txt` where `logs.attach_log_file` is at work.
"""

import contextlib
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping
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
from grpo_jax.reporting import metrics as names
from grpo_jax.reporting.text import (
    Prompt,
    duration_text,
    escape_control_chars,
    prompt_text,
)

# Lines about single steps; a live display shows them in its own way.
_PROGRESS = logs.LOGGER.getChild("progress")

# Name on the screen, metric, format.
_SHOWN = (
    ("reward", names.REWARD, "{:.3f}"),
    ("accuracy", names.ACCURACY, "{:.1%}"),
    ("held-out reward", names.EVAL_REWARD, "{:.3f}"),
    ("kl", names.KL, "{:.4f}"),
    ("length", names.MEAN_LENGTH, "{:.1f}"),
    ("cut", names.CLIPPED_RATIO, "{:.0%}"),
    ("grad", names.GRAD_NORM, "{:.3g}"),
    ("tok/s", names.TOKENS_PER_SECOND, "{:,.0f}"),
)
_SAMPLE_SECONDS = 3.0  # a sample stays at least so long, to be read
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
                    console=self._screen, get_renderable=self._shown
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
        # An evaluation stays on display until the next one.
        # Replaced, not changed: the thread that redraws may be reading it.
        self._latest = self._latest | to_jsonable(metrics)
        self._clock.tick(step)
        if step % self._every == 0 or step in (1, self._total):
            _PROGRESS.info(self._line(metrics))

    def sample(
        self, prompt: Prompt, completion: str, rewards: Mapping[str, float | None]
    ) -> None:
        """Show a completion with its rewards by name; only a live display does."""
        now = time.monotonic()
        if self._live is None or now < self._sample_time + _SAMPLE_SECONDS:
            return
        self._sample_time = now
        # It stays on display while further steps end.
        title = f"a completion of step {self._step}"
        self._sample = _sample_panel(title, prompt_text(prompt), completion, rewards)

    def note(self, text: str) -> None:
        """Show a line of information."""
        if self._enabled:
            logs.LOGGER.info(text)

    def phase(self, text: str) -> None:
        """Show what begins, once: only the first time it has to be compiled."""
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
            logs.LOGGER.info(f"{name:<{width}}  {_summary_text(name, value)}")

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
            self._fall_silent()

    def _fall_silent(self) -> None:
        """Go on without a reader, as after `| head`: the run is worth more than that.

        What is left in the stream's buffer must not fail at the end of the program
        either, so its file becomes one that takes everything.
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

    def _shown(self) -> rich.console.Group:
        """The live display; drawn again several times a second, so that time passes."""
        table = [self._table()] if self._latest else []
        sample = [] if self._sample is None else [self._sample]
        return rich.console.Group(self._bar(), *table, *sample)

    def _bar(self) -> Table:
        bar = Table.grid(padding=(0, 1))
        left = self._clock.left()
        bar.add_row(
            Text(f"step {self._step}/{self._total}", style="bold"),
            ProgressBar(total=self._total, completed=self._step, width=40),
            Text(f"{duration_text(self._clock.elapsed())} so far"),
            Text("" if left is None else f"{duration_text(left)} left"),
        )
        return bar

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 3))
        shown = _formatted(self._latest)
        table.add_row(*(Text(label, style="dim") for label, _ in shown))
        table.add_row(*(Text(text, style="bold") for _, text in shown))
        return table


def next_commands(run_dir: Path, config: TrainConfig) -> str:
    """What can be done with a run that has ended, a command per line."""
    folder = shlex.quote(str(run_dir))
    best = " --step best" if config.checkpoint.keep_best else ""
    adapter = "" if config.lora.rank is None else " --adapter"
    lines = (
        f"eval --run-dir {folder}{best}",
        f"sample --run-dir {folder}{best} --prompt TEXT",
        f"report {folder}",
        f"export --run-dir {folder}{best}{adapter} --out FOLDER",
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
        # The first step that was seen, and when.
        self._first: tuple[int, float] | None = None
        self._latest = (0, self._start)

    def tick(self, step: int) -> None:
        """Note that `step` has ended; step 0 is an evaluation and does not count."""
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
    """Whether a person reads a stream: no file, no pipe, no job of a CI."""
    dumb = os.environ.get("TERM", "") in ("", "dumb")
    return stream.isatty() and not dumb and not os.environ.get("CI")


def _formatted(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of the metrics that people watch and that are there."""
    plain = to_jsonable(metrics)
    return [
        (label, "-" if plain[name] is None else form.format(plain[name]))
        for label, name, form in _SHOWN
        if name in plain
    ]


def _summary_text(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if "accuracy" in name:
        return f"{value:.1%}"
    return duration_text(value) if name == "seconds" else f"{value:.4g}"


def _sample_panel(
    title: str, prompt: str, completion: str, rewards: Mapping[str, float | None]
) -> Panel:
    scores = "  ".join(
        f"{name} {'none' if value is None else format(value, '.3g')}"
        for name, value in rewards.items()
    )
    body = Text()
    body.append(_shortened(prompt) + "\n", style="dim")
    body.append(_shortened(completion) + "\n")
    body.append(escape_control_chars(scores), style="bold")
    return Panel(body, title=Text(title), title_align="left")


def _shortened(text: str) -> str:
    """The last lines of a long text, where a prompt asks and a completion answers."""
    lines = escape_control_chars(text).expandtabs(4).strip("\n").split("\n")
    cut = ["..."] if len(lines) > _SAMPLE_LINES else []
    lines = cut + lines[-_SAMPLE_LINES:]
    return "\n".join(line if len(line) <= 400 else line[:397] + "..." for line in lines)
