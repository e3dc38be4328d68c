"""Reads what a run wrote: lines of JSON, completions, and the curve of a metric."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMPLETIONS_DIR = "completions"


def completion_steps(run_dir: str | Path) -> list[int]:
    """The steps whose completions were written, in order."""
    files = (Path(run_dir) / COMPLETIONS_DIR).glob("step_*.jsonl")
    return sorted(int(file.stem.removeprefix("step_")) for file in files)


def read_completions(run_dir: str | Path, step: int) -> list[dict[str, Any]]:
    """The completions written at `step`, one dict each."""
    return read_lines(completions_file(run_dir, step))


def completions_file(run_dir: str | Path, step: int) -> Path:
    """The file of the completions of `step`."""
    return Path(run_dir) / COMPLETIONS_DIR / f"step_{step:06d}.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without a torn last line."""
    # Split bytes, because a text may contain other line breaks than the newline.
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        # ValueError also covers a line that is not text: cut within a character, or
        # filled with zeros.
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number} is damaged ({error}); remove that line"
            ) from error
    return records


def series(
    history: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, without the lines that lack a number for it."""
    found = [(line["step"], line.get(name)) for line in history]
    points = [(step, value) for step, value in found if isinstance(value, int | float)]
    return [step for step, _ in points], [float(value) for _, value in points]
