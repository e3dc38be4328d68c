"""Every metric with a name of its own reaches the console, the plot and the page."""

import dataclasses
import io

import pytest

from grpo_jax.config import ReportConfig
from grpo_jax.reporting import metrics
from grpo_jax.reporting._panels import panels_of
from grpo_jax.reporting.console import Console
from grpo_jax.reporting.page import write_report
from grpo_jax.reporting.trackers import make_tracker

NO_METRICS = {"METRICS_FILE"}
NAMES = {
    value
    for name, value in vars(metrics).items()
    if name.isupper() and isinstance(value, str) and not name.startswith("_")
    if name not in NO_METRICS
}
EVERYTHING = dict.fromkeys(NAMES, 0.25)
# Where a metric is left out on purpose.
LEFT_OUT = {
    ("console", metrics.REWARD_STD),
    ("console", metrics.ENTROPY),
    ("console", metrics.FAILED_CALLS),
    # A warning tells of it, where it is 1 for long.
    ("console", metrics.EQUAL_GROUPS),
    ("plot", metrics.EQUAL_GROUPS),
    ("page", metrics.EQUAL_GROUPS),
}


def on_console(line, tmp_path):
    stream = io.StringIO()
    with Console(9, ReportConfig(), stream=stream) as screen:
        screen.step(1, line)
    return stream.getvalue()


def in_plot(line, tmp_path):
    panels = panels_of([[line | {"step": 1}]])
    return [dataclasses.asdict(panel) for panel in panels if panel.band is None] + [
        panel.metric for panel in panels if panel.band in line
    ]


def on_page(line, tmp_path):
    """What the page shows without being asked for all metrics."""
    tracker = make_tracker(ReportConfig(), tmp_path)
    tracker.log(line, 1)
    tracker.close()
    text = write_report(tmp_path).read_text()
    cards = text[text.index('class="cards"') : text.index("<h2>Curves")]
    return cards, in_plot(line, tmp_path)


@pytest.fixture(scope="module", params=[on_console, in_plot, on_page])
def way(request, tmp_path_factory):
    """A way to show metrics, and what it shows of all of them."""
    return request.param, request.param(EVERYTHING, tmp_path_factory.mktemp("all"))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_metric_with_a_name_is_shown_or_listed_as_not(name, way, tmp_path):
    shown, everything = way
    less = {metric: value for metric, value in EVERYTHING.items() if metric != name}
    place = shown.__name__.rpartition("_")[2]
    assert (shown(less, tmp_path) != everything) == ((place, name) not in LEFT_OUT)


def test_a_held_out_reward_stands_where_the_accuracy_would(tmp_path):
    tracker = make_tracker(ReportConfig(), tmp_path)
    for step, value in enumerate([0.25, 0.5, 0.75]):
        tracker.log({metrics.EVAL_REWARD: value}, step)
    tracker.close()
    page = write_report(tmp_path).read_text()
    assert "held-out reward</span><strong>0.25 → 0.75</strong><small>+0.5<" in page
    assert "held-out reward 0.250" in on_console({metrics.EVAL_REWARD: 0.25}, tmp_path)
