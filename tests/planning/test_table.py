"""The table of a plan: every size where it belongs, and advice only where needed."""

import io
import re

import pytest
import rich.console

from grpo_jax.planning.table import print_plan

GIB = 2**30


def plan(**changes):
    return {
        "model": "[bold]m[/bold]",
        "mesh": {"data": 1, "fsdp": 4},
        "compute_dtype": "bfloat16",
        "remat": "block",
        "sampler": "gathered",
        "always": {"parameters": 3 * GIB},
        "phases": {"rollout": {"cache": 2 * GIB}, "update": {"gradients": GIB // 4}},
        "totals": {"rollout": 5 * GIB, "update": 3 * GIB + GIB // 4},
        "peak": 5 * GIB,
        "usable": None,
        "fits": None,
        "refused": None,
        "knobs": {"--microbatch-size 8": GIB, "--remat none": 2**20},
    } | changes


def shown(values):
    out = io.StringIO()
    print_plan(values, console=rich.console.Console(file=out, width=100))
    return out.getvalue()


def cells(text, name):
    """The numbers in the row of a name."""
    line = next(line for line in text.splitlines() if re.search(rf"\b{name}\b", line))
    return re.findall(r"<?\d+\.\d\d", line)


def test_what_is_always_there_is_in_every_phase_and_the_rest_in_its_own():
    text = shown(plan())
    assert cells(text, "parameters") == ["3.00", "3.00"]
    assert cells(text, "cache") == ["2.00"]
    assert cells(text, "gradients") == ["0.25"]
    assert cells(text, "total") == ["5.00", "3.25"]
    assert text.index("rollout") < text.index("update")


def test_text_is_shown_letter_by_letter():
    assert "[bold]m[/bold] on data 1 x fsdp 4: bfloat16, remat block" in shown(plan())


@pytest.mark.parametrize(
    ("changes", "told", "untold"),
    [
        ({}, "What would save", "fits"),
        ({"usable": 8 * GIB, "fits": True}, "fits: 5.00 of 8.00 GiB", "would save"),
        ({"usable": 4 * GIB, "fits": False}, "does not fit: 5.00 of 4.00", "nothing"),
        ({"usable": 4 * GIB, "fits": False, "knobs": {}}, "does not fit", "would save"),
        ({"refused": "the context is short"}, "the context is short", "GiB that are"),
    ],
)
def test_the_verdict_and_what_to_turn(changes, told, untold):
    text = shown(plan(**changes))
    assert told in text and untold not in text
    if "What would save" in text:
        saves = re.findall(r"(\S+) GiB  (--.*)", text)
        assert saves == [("1.00", "--microbatch-size 8"), ("<0.01", "--remat none")]
