"""Curves of one run, or of several in the same panels, drawn by Matplotlib."""

import io
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_jax.reporting import _run_files
from grpo_jax.reporting._panels import PANELS, Panel, panels_of, trend
from grpo_jax.reporting.text import escape_control_chars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, https://jfly.uni-koeln.de/color/: people with every kind of color
# vision can tell these apart. Without yellow, which is too faint on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", "--", "-.", ":")
# From here on single steps are drawn faint, with their running mean over them.
_MANY_STEPS = 40


def make_figure(
    runs: dict[str, list[dict[str, Any]]], panels: Sequence[Panel] | None = None
) -> "Figure":
    """A figure of the histories by name.

    It has the given panels; by default one for each metric that some run has.
    """
    # Not pyplot: it keeps figures alive, and may look for a display.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = panels_of(runs.values()) if panels is None else panels
    if not panels:
        wanted = ", ".join(panel.metric for panel in PANELS)
        raise ValueError(f"nothing to draw: no run has any of {wanted}")
    columns = min(2 if len(panels) <= 4 else 3, len(panels))
    rows = -(-len(panels) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(4.6 * columns, 2.8 * rows + 0.6), layout=layout)
    # One horizontal range for all panels, so that they can be read across.
    steps = [line["step"] for history in runs.values() for line in history]
    first, last = min(steps), max(steps)
    margin = max(0.02 * (last - first), 0.5)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_panel(axes, panel, runs)
        axes.set_xlim(first - margin, last + margin)
    _name_runs(figure, list(runs))
    return figure


def to_svg(figure: "Figure") -> str:
    """The figure as an SVG element, for a page that is read in the light or the dark.

    Black becomes the color of the page's text, and the first curve has its `--curve`.
    """
    from matplotlib import rc_context

    file = io.StringIO()
    # Text stays text: small, searchable, and in the page's font. No date and no random
    # ids, so that the same run gives the same curves.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ""}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # an element of HTML has no declaration
    return svg.replace("#000000", "currentColor").replace("#0072b2", "var(--curve)")


def _draw_panel(
    axes: "Axes", panel: Panel, runs: dict[str, list[dict[str, Any]]]
) -> None:
    # Colors in turn; after the last one they start again, with another line style.
    looks = ((color, style) for style in cycle(_STYLES) for color in _COLORS)
    for (name, history), (color, style) in zip(runs.items(), looks, strict=False):
        steps, values = _run_files.series(history, panel.metric)
        if not steps:
            continue
        # A single point has no line, and evaluations are few: mark the points.
        marker = "o" if panel.sparse or len(steps) == 1 else ""
        if len(steps) >= _MANY_STEPS and not panel.sparse:
            axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
            values = trend(values)
        (line,) = axes.plot(steps, values, color=color, linestyle=style, label=name)
        line.set(linewidth=1.7, marker=marker, markersize=4)
        _draw_band(axes, panel, history, color)
    low, high = axes.dataLim.intervaly
    # A flat curve needs no scale of hundredths. A running mean of equal values is flat
    # up to rounding.
    if high - low <= 1e-9 * abs(high):
        axes.set_ylim(low - 0.05, low + 1.0)
    # A reward's name may hold a dollar sign, which would begin a formula.
    title = escape_control_chars(panel.title)
    axes.set_title(title, loc="left", fontsize=11, pad=8, parse_math=False)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(panel.label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_band(
    axes: "Axes", panel: Panel, history: list[dict[str, Any]], color: str
) -> None:
    """A band of plus and minus a metric around that of the panel, both smoothed."""
    if panel.band is None:
        return
    middle_at = dict(zip(*_run_files.series(history, panel.metric), strict=True))
    spread_at = dict(zip(*_run_files.series(history, panel.band), strict=True))
    steps = sorted(middle_at.keys() & spread_at.keys())
    if not steps:
        return
    middle = np.array(_smooth([middle_at[step] for step in steps]))
    spread = np.array(_smooth([spread_at[step] for step in steps]))
    axes.fill_between(
        steps, middle - spread, middle + spread, color=color, alpha=0.12, linewidth=0
    )


def _smooth(values: list[float]) -> list[float]:
    return values if len(values) < _MANY_STEPS else trend(values)


def _name_runs(figure: "Figure", names: list[str]) -> None:
    """A title for one run; for several a legend below the panels."""
    if len(names) == 1:
        figure.suptitle(names[0], fontsize=12, fontweight="bold")
        return
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(4, len(handles)),
        frameon=False,
    )
