"""A run as one HTML page that asks nothing of the network and trusts no model text.

Curves, configuration, environment, and the best and worst completions of each step.
What a model wrote reaches the page only as JSON data and is shown as text, never as
markup; a content security policy lets no script run but the page's own.
"""

import base64
import dataclasses
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.config.files import to_json_line, write_text
from grpo_jax.reporting import metrics
from grpo_jax.reporting.page_assets import SCRIPT, STYLE
from grpo_jax.reporting.panels import panels_of
from grpo_jax.reporting.text import duration_text, prompt_text, visible

_PER_STEP = 2  # best completions of a step, and as many worst
_MAX_STEPS = 250  # with completions; of more, an even choice is shown
_MAX_POINTS = 2000  # of a curve; of more, an even choice is drawn
_MAX_CHARACTERS = 8000  # of a prompt or completion; the rest is cut


def write_report(run_dir: str | Path, out_html: str | Path | None = None) -> Path:
    """The path of the run's page, `report.html` in its directory by default.

    Works for a run that is still going on, has no evaluation or no completions. Raises
    ValueError when the directory has no metrics, or the page cannot be written.
    """
    folder = Path(run_dir).resolve()
    history = metrics.read_metrics(folder)
    path = folder / "report.html" if out_html is None else Path(out_html)
    text = _page(folder, history)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}); give another file (--out)"
        ) from error
    return path


def _page(folder: Path, history: Sequence[Mapping[str, Any]]) -> str:
    manifest = _read_json(folder / "manifest.json")
    summary = _read_json(folder / "summary.json")
    status = str(manifest.get("status", "running"))
    rows, completions_note = _completions(folder)
    data = {
        "panels": [dataclasses.asdict(panel) for panel in panels_of([history])],
        "series": _all_series(history),
        "rows": rows,
    }
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';"
        " base-uri 'none'; form-action 'none'"
    )
    return _TEMPLATE.format(
        policy=html.escape(policy),
        name=_escape(folder.name),
        status=_escape(status),
        style=STYLE,
        cards=_cards(summary, history),
        completions_note=_escape(completions_note),
        config=_escape(_read_text(folder / "config.yaml")),
        environment=_table(manifest),
        data=_script_json(data),
        script=SCRIPT,
    )


def _cards(summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    """The numbers at the top, as far as the run has them."""
    cards = []
    if accuracy := _before_and_after("accuracy", metrics.ACCURACY, summary, history):
        before, after = accuracy
        gain = f"{100 * (after - before):+.1f} points"
        cards.append(("held-out accuracy", f"{before:.1%} → {after:.1%}", gain))
    if reward := _before_and_after(
        "eval_reward", metrics.EVAL_REWARD, summary, history
    ):
        before, after = reward
        gain = f"{after - before:+.3g}"
        cards.append(("held-out reward", f"{before:.3g} → {after:.3g}", gain))
    _, rewards = metrics.series(history, metrics.REWARD)
    if rewards:
        few = -(-len(rewards) // 10)
        first, last = sum(rewards[:few]) / few, sum(rewards[-few:]) / few
        note = "first and last tenth of the steps"
        cards.append(("reward", f"{first:.3g} → {last:.3g}", note))
    steps = summary.get("steps", history[-1]["step"] if history else 0)
    cards.append(("steps", f"{steps:,}", ""))
    if "seconds" in summary:
        cards.append(("time", duration_text(summary["seconds"]), ""))
    _, speed = metrics.series(history, metrics.TOKENS_PER_SECOND)
    if speed:
        median = sorted(speed)[len(speed) // 2]
        cards.append(("tokens per second", f"{median:,.0f}", "median step"))
    return "".join(_card(*card) for card in cards)


def _before_and_after(
    name: str, metric: str, summary: Mapping[str, Any], history: Sequence[Any]
) -> tuple[float, float] | None:
    """What evaluations found at first and at last, by the summary or the curve."""
    _, values = metrics.series(history, metric)
    before = summary.get(f"{name}_before", values[0] if values else None)
    after = summary.get(f"{name}_after", values[-1] if values else None)
    return None if before is None or after is None else (before, after)


def _card(label: str, value: str, note: str) -> str:
    return (
        f'<div class="card"><span class="label">{_escape(label)}</span>'
        f"<strong>{_escape(value)}</strong><small>{_escape(note)}</small></div>"
    )


def _all_series(history: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Every metric as its steps and values, in the order in which they first appear."""
    found = dict.fromkeys(name for line in history for name in line)
    curves = {}
    for name in found:
        steps, values = metrics.series(history, name)
        if name != "step" and steps:
            curves[name] = [_thinned(steps, _MAX_POINTS), _thinned(values, _MAX_POINTS)]
    return curves


def _completions(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows shown of each step, best first, and a sentence on what they are."""
    written = metrics.completion_steps(folder)
    if not written:
        return [], "This run has written no completions."
    steps = _thinned(written, _MAX_STEPS)
    rows = [
        row
        for step in steps
        for row in _best_and_worst(metrics.read_completions(folder, step))
    ]
    whole = "" if len(steps) == len(written) else f", of {len(written)} written"
    return rows, (
        f"Up to {_PER_STEP} best and {_PER_STEP} worst by reward at each of"
        f" {len(steps)} steps{whole}; all of them are in {metrics.COMPLETIONS_DIR}/."
    )


def _best_and_worst(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the highest and lowest rewards, none without reward.

    None comes twice, nor does the same completion of the same prompt.
    """
    distinct = {
        (prompt_text(row["prompt"]), row["completion"]): row
        for row in reversed(rows)
        if row["reward"] is not None
    }
    scored = list(reversed(distinct.values()))
    scored.sort(key=lambda row: row["reward"], reverse=True)
    best = scored[:_PER_STEP]
    worst = scored[len(best) :][-_PER_STEP:]
    return [_shown(row, "best") for row in best] + [
        _shown(row, "worst") for row in worst
    ]


def _shown(row: Mapping[str, Any], rank: str) -> dict[str, Any]:
    texts = {
        "prompt": _cut(prompt_text(row["prompt"])),
        "completion": _cut(row["completion"]),
    }
    return {**row, **texts, "rank": rank}


def _cut(text: str) -> str:
    left = len(text) - _MAX_CHARACTERS
    ending = f"\n... [{left} more characters]" if left > 0 else ""
    return visible(text[:_MAX_CHARACTERS]) + ending


def _table(value: Any) -> str:
    """Nested objects as nested tables, everything else as text."""
    if isinstance(value, Mapping):
        cells = "".join(
            f"<tr><th>{_escape(str(key))}</th><td>{_table(item)}</td></tr>"
            for key, item in value.items()
        )
        return f"<table>{cells}</table>"
    if isinstance(value, list):
        return ", ".join(map(_table, value))
    return _escape("" if value is None else str(value))


def _thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly chosen, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[index * (len(items) - 1) // (most - 1)] for index in range(most)]


def _escape(text: str) -> str:
    return html.escape(visible(text))


def _script_json(data: Mapping[str, Any]) -> str:
    r"""JSON that a script element can hold: no `<` in it can end the element.

    Inside of JSON these characters occur in texts only, where escapes mean the same.
    """
    text = to_json_line(data)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.is_file() else {}


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{name}</h1><span class="status">{status}</span></header>
<section class="cards">{cards}</section>
<section><h2>Curves</h2>
<p class="note">By step. Where there are many steps, faint lines are single steps and
bold ones their running mean.</p><div id="curves" class="charts"></div>
<details id="every"><summary>All metrics</summary><div class="charts"></div></details>
</section>
<section><h2>Completions</h2><p class="note">{completions_note}</p>
<form id="filters">
<label>Steps <span><input name="from" type="number" aria-label="first step"> –
<input name="to" type="number" aria-label="last step"></span></label>
<label>Reward <span>
<input name="low" type="number" step="any" aria-label="lowest reward"> –
<input name="high" type="number" step="any" aria-label="highest reward"></span></label>
<label>Show <select name="rank"><option value="">best and worst</option>
<option value="best">best</option><option value="worst">worst</option></select></label>
<label>Sort <select name="sort"><option value="-step">latest step first</option>
<option value="step">first step first</option>
<option value="-reward">highest reward first</option>
<option value="reward">lowest reward first</option>
<option value="-length">longest first</option>
<option value="length">shortest first</option></select></label>
<label class="wide">Text <input name="text" type="search"
placeholder="in prompt or completion"></label>
<button type="reset">Clear</button><output id="count"></output>
</form>
<div id="rows"></div><button id="more" type="button" hidden>Show more</button>
</section>
<section class="two"><div><h2>Configuration</h2><pre>{config}</pre></div>
<div><h2>Environment</h2>{environment}</div></section>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""
