"""A run as one HTML page that works offline and trusts no model text.

Curves, configuration, environment, and the best and worst completions of each step.
The template escapes every value that it shows. A content security policy lets no
script run except the page's own.
"""

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from grpo_jax.checkpointing.bucket import bucket_address, local_copy
from grpo_jax.config.files import write_text
from grpo_jax.reporting import _run_files, metrics
from grpo_jax.reporting._figure import make_figure, to_svg
from grpo_jax.reporting._panels import Panel, panels_of
from grpo_jax.reporting.text import (
    Messages,
    Part,
    duration_text,
    escape_control_chars,
    parts_of,
    readable_text,
)

_TEMPLATE = Path(__file__).parents[1] / "assets" / "report.html"
_PER_STEP = 2  # best completions of a step, and as many worst
_MAX_STEPS = 250  # with completions; of more, an even choice is shown
_MAX_CHARACTERS = 8000  # of a prompt or completion; the rest is cut


def write_report(run_dir: str | Path, out_html: str | Path | None = None) -> Path:
    """The path of the run's page, `report.html` in its directory by default.

    For a run in a bucket the default is `report.html` in the current folder. Works for
    a run that is still going on, has no evaluation or no completions. Raises ValueError
    when the directory has no metrics, or the page cannot be written.
    """
    folder = local_copy(run_dir, completions=True).resolve()
    history = metrics.read_metrics(folder)
    home = folder if bucket_address(run_dir) is None else Path()
    path = home / "report.html" if out_html is None else Path(out_html)
    text = _page(folder, history)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}); give another file (--out)"
        ) from error
    return path


def _page(folder: Path, history: list[dict[str, Any]]) -> str:
    manifest = json.loads(_read(folder / "manifest.json") or "{}")
    summary = json.loads(_read(folder / "summary.json") or "{}")
    panels = panels_of([history])
    names = dict.fromkeys(name for line in history for name in line)
    shown = {"step", *(panel.metric for panel in panels)}
    others = [Panel(title=n, metric=n, label="") for n in names if n not in shown]
    rows, completions_note = _completions(folder)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters["number"] = _number
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        nonce=secrets.token_urlsafe(16),
        name=folder.name,
        status=manifest.get("status", "running"),
        cards=_cards(summary, history),
        curves=_curves(panels, history),
        other_curves=_curves(others, history),
        completions_note=completions_note,
        rows=rows,
        has_conversations=any(row["messages"] for row in rows),
        config=_read(folder / "config.yaml"),
        manifest=manifest,
    )
    return escape_control_chars(page)


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _curves(panels: Sequence[Panel], history: list[dict[str, Any]]) -> str:
    """The panels that have values, as one SVG; empty when none has."""
    drawn = [panel for panel in panels if _run_files.series(history, panel.metric)[0]]
    return to_svg(make_figure({"": history}, drawn)) if drawn else ""


def _cards(
    summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    """Label, value and note of the numbers at the top, as far as the run has them."""
    cards = []
    held_out = (("accuracy", metrics.ACCURACY), ("eval_reward", metrics.EVAL_REWARD))
    for name, metric in held_out:
        _, values = _run_files.series(history, metric)
        before = summary.get(f"{name}_before", values[0] if values else None)
        after = summary.get(f"{name}_after", values[-1] if values else None)
        if before is None or after is None:
            continue
        if metric == metrics.ACCURACY:
            change = f"{before:.1%} → {after:.1%}"
            gain = f"{100 * (after - before):+.1f} points"
            cards.append(("held-out accuracy", change, gain))
        else:
            change = f"{before:.3g} → {after:.3g}"
            cards.append(("held-out reward", change, f"{after - before:+.3g}"))
    _, rewards = _run_files.series(history, metrics.REWARD)
    if rewards:
        few = -(-len(rewards) // 10)
        first, last = sum(rewards[:few]) / few, sum(rewards[-few:]) / few
        note = "first and last tenth of the steps"
        cards.append(("reward", f"{first:.3g} → {last:.3g}", note))
    steps = summary.get("steps", history[-1]["step"] if history else 0)
    cards.append(("steps", f"{steps:,}", ""))
    if "seconds" in summary:
        cards.append(("time", duration_text(summary["seconds"]), ""))
    _, speed = _run_files.series(history, metrics.TOKENS_PER_SECOND)
    if speed:
        median = sorted(speed)[len(speed) // 2]
        cards.append(("tokens per second", f"{median:,.0f}", "median step"))
    return cards


def _completions(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows shown, latest step first and best first, and a sentence about them."""
    written = _run_files.completion_steps(folder)
    if not written:
        return [], "This run has written no completions."
    steps = written
    if len(steps) > _MAX_STEPS:  # an even choice, with the first and the last
        last = len(steps) - 1
        steps = [steps[i * last // (_MAX_STEPS - 1)] for i in range(_MAX_STEPS)]
    rows = [
        row
        for step in reversed(steps)
        for row in _best_and_worst(_run_files.read_completions(folder, step))
    ]
    whole = "" if len(steps) == len(written) else f", of {len(written)} written"
    return rows, (
        f"Up to {_PER_STEP} best and {_PER_STEP} worst by reward at each of"
        f" {len(steps)} steps{whole}; all of them are in {_run_files.COMPLETIONS_DIR}/."
    )


def _best_and_worst(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the highest and lowest rewards, none without reward.

    None comes twice, nor does the same completion of the same prompt.
    """
    distinct = {
        (readable_text(row["prompt"]), readable_text(row["completion"])): row
        for row in reversed(rows)
        if row["reward"] is not None
    }
    scored = list(reversed(distinct.values()))
    scored.sort(key=lambda row: row["reward"], reverse=True)
    best = scored[:_PER_STEP]
    worst = scored[len(best) :][-_PER_STEP:]
    ranked = [("best", row) for row in best] + [("worst", row) for row in worst]
    return [
        {
            **row,
            "rank": rank,
            "prompt": _cut(readable_text(row["prompt"])),
            "notes": _notes(row),
            **_said(row["completion"]),
        }
        for rank, row in ranked
    ]


def _said(completion: Messages) -> dict[str, Any]:
    """A completion for the template: its text, or the pieces of each message."""
    if isinstance(completion, str):
        return {"completion": _cut(completion), "messages": [], "left_out": 0}
    messages = parts_of(completion)
    shown: list[list[Part]] = []
    room = _MAX_CHARACTERS
    for parts in messages:
        if room <= 0:
            break
        shown.append([])
        for part in parts:
            text = _cut(part.text, max(room, 0))
            shown[-1].append(dataclasses.replace(part, text=text))
            room -= len(part.text)
    left_out = len(messages) - len(shown)
    return {"completion": None, "messages": shown, "left_out": left_out}


def _notes(row: Mapping[str, Any]) -> list[str]:
    """What happened in an episode, a few words each; nothing for a plain completion."""
    turns, calls, failed, malformed = (
        # Before there were episodes, a reward function could log such a column.
        count if isinstance(count := row.get(name), int) else 0
        for name in ("turns", "calls", "failed_calls", "malformed_calls")
    )
    notes = [
        f"{count:,} {noun}{'' if count == 1 else 's'}"
        for count, noun in ((turns, "turn"), (calls, "call"))
        if count
    ]
    if failed:
        notes.append(f"{failed:,} failed")
    if malformed:
        notes.append(f"{malformed:,} that cannot be read")
    if row.get("dropped_answers") is True:
        notes.append("the last answer did not fit")
    if turns > 1 and isinstance(row["completion"], str):
        notes.append("text of the environment within, which is masked")
    return notes


def _cut(text: str, most: int = _MAX_CHARACTERS) -> str:
    left = len(text) - most
    return text[:most] + (f"\n... [{left} more characters]" if left > 0 else "")
