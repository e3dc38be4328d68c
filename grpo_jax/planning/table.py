"""Shows a plan of memory as a table in the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from grpo_jax.planning._compiled_table import compiled_tables


def print_plan(plan: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Print the plan of `make_plan` or `compile_plan`; sizes in GiB per device."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    heading = Text(
        f"{plan['model']} on {mesh}: {plan['compute_dtype']}, remat {plan['remat']}, "
        f"sampler {plan['sampler']}"
    )
    parts = [heading, _sizes(plan), *_conclusion(plan)]
    if "compiled" in plan:
        parts += compiled_tables(plan["compiled"])
    (console or Console()).print(Group(*parts))


def _sizes(plan: Mapping[str, Any]) -> Table:
    phases = plan["phases"]
    table = Table("GiB on each device", *phases, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, size in plan["always"].items():
        table.add_row(name, *[_gib(size)] * len(phases))
    table.add_section()
    for name in dict.fromkeys(name for sizes in phases.values() for name in sizes):
        table.add_row(name, *[_gib(sizes.get(name)) for sizes in phases.values()])
    table.add_section()
    totals = [_gib(plan["totals"][phase]) for phase in phases]
    table.add_row("total", *totals, style="bold")
    return table


def _conclusion(plan: Mapping[str, Any]) -> list[Text]:
    lines = []
    if plan["refused"] is not None:
        lines.append(Text(f"would be refused: {plan['refused']}", style="bold red"))
    if plan["usable"] is not None:
        words = "fits" if plan["fits"] else "does not fit"
        style = "green" if plan["fits"] else "bold red"
        usable = f"{_gib(plan['peak'])} of {_gib(plan['usable'])} GiB that are usable"
        lines.append(Text(f"{words}: {usable}", style=style))
    if not plan["fits"] and plan["knobs"]:
        lines.append(Text("What would save, at the peak:"))
        lines += [
            Text(f"  {_gib(size):>8} GiB  {flags}")
            for flags, size in plan["knobs"].items()
        ]
    return lines


def _gib(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 2**30:.2f}" if size >= 2**30 / 100 else "<0.01"
