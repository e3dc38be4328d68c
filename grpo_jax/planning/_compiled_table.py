"""Tables of what a compiler says of the programs of a run."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

_GIB = 2**30
# Of a program's collective operations, those that are shown.
_SHOWN = 4


def compiled_tables(compiled: Mapping[str, Any]) -> list[Table | Text]:
    """The programs, their phases beside the plan, their communication, the outcome."""
    made = [row for row in compiled["programs"] if "error" not in row]
    parts: list[Table | Text] = [
        Text(f"\ncompiled for {compiled['target']}"),
        _programs(made),
        _phases(compiled),
        _communication(made),
    ]
    for row in compiled["programs"]:
        if "error" in row:
            name = f"{row['phase']}: {row['program']}"
            text = f"{name} does not compile: {row['error']}"
            parts.append(Text(text, style="bold red"))
    if compiled["fits"] is not None:
        words = "fits" if compiled["fits"] else "does not fit"
        style = "green" if compiled["fits"] else "bold red"
        sizes = f"{_gib(compiled['peak'])} of {_gib(compiled['usable'])} GiB"
        parts.append(Text(f"{words}, by the compiler: {sizes}", style=style))
    return parts


def _programs(rows: list[dict[str, Any]]) -> Table:
    columns = "arguments", "temporaries", "results", "code", "others", "peak"
    table = _table(
        "GiB on each device", *columns, "TFLOP", "GiB moved", "times", "floor", "s"
    )
    for row in rows:
        table.add_row(
            f"{row['phase']}: {row['program']}",
            *(_gib(row[name]) for name in columns),
            f"{row['flops'] / 1e12:.3g}",
            f"{row['moved'] / _GIB:.3g}",
            str(row["times"] or ""),
            _seconds(row["floor"]),
            f"{row['compile_seconds']:.0f}",
        )
    return table


def _phases(compiled: Mapping[str, Any]) -> Table:
    table = _table("phase", "compiled", "plan", "ratio", "floor of a step")
    for name, sizes in compiled["phases"].items():
        ratio = "" if sizes["ratio"] is None else f"{sizes['ratio']:.2f}"
        plan = "" if sizes["plan"] is None else _gib(sizes["plan"])
        floor = _seconds(sizes["floor"])
        table.add_row(name, _gib(sizes["peak"]), plan, ratio, floor)
    table.add_section()
    table.add_row("all", _gib(compiled["peak"]), "", "", _seconds(compiled["floor"]))
    return table


def _communication(rows: list[dict[str, Any]]) -> Table:
    table = _table("received in a step", "kind", "dtype", "count", "MiB", "largest")
    for row in rows:
        often = row["times"] or 1
        for number, one in enumerate(row["sent"][:_SHOWN]):
            table.add_row(
                "" if number else f"{row['phase']}: {row['program']}",
                one["kind"],
                one["dtype"],
                f"{often * one['count']:,}",
                f"{often * one['bytes'] / 2**20:,.1f}",
                one["largest"],
            )
    return table


def _table(*columns: str) -> Table:
    table = Table(*columns, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}" if size >= _GIB / 100 else "<0.01"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} s"
