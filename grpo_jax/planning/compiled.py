"""What compiled programs need: memory, products, communication, and least times.

Numbers are of one device. What the compiler reserves is read from the compiled program,
the rest is counted from its text.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from jax.stages import Lowered

from grpo_jax.planning._counts import products, sent
from grpo_jax.planning._program_text import Program
from grpo_jax.planning.devices import Device


class _ProgramToCompile(Protocol):
    """A program of a run, as `training._lowered` describes it."""

    @property
    def phase(self) -> str:
        """The phase of the run."""
        ...

    @property
    def name(self) -> str:
        """What it does."""
        ...

    @property
    def lower(self) -> Callable[[], Lowered]:
        """What compiles, when called."""
        ...

    @property
    def others(self) -> int:
        """Bytes that the run holds meanwhile, beside its arguments."""
        ...

    @property
    def times(self) -> int:
        """How often it runs in a step."""
        ...

    @property
    def turns(self) -> int:
        """How often the loop over tokens runs."""
        ...


def measure(program: _ProgramToCompile, device: Device | None) -> dict[str, Any]:
    """Compile a program; what it needs, as plain values, sizes in bytes.

    ``peak`` is what the device holds while it runs: its arguments, temporaries and
    results, its code, and what the run holds beside. ``flops``, ``moved`` (between main
    memory and cores), ``sent`` and ``received`` are of one call. ``floor`` is the least
    time of a call in seconds by the rates of the device; None without a device.

    A program that does not compile, or whose text JAX cannot read, has its ``error``
    instead of all these.
    """
    row = {"phase": program.phase, "program": program.name, "times": program.times}
    start = time.perf_counter()
    try:
        compiled = program.lower().compile()
        written = compiled.as_text() or ""
    # What a compiler refuses has no type of its own. A libtpu newer than JAX compiles,
    # and JAX cannot read the program.
    except Exception as error:
        return {**row, "error": str(error)}
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    own = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "others": program.others,
    }
    text = Program(written, turns=program.turns)
    collectives = sent(text)
    counts = {
        "flops": products(text),
        "moved": sum(text.traffic(text.entry).values()),
        "received": sum(one.bytes for one in collectives),
    }
    return {
        **row,
        **own,
        "peak": sum(own.values()),
        **counts,
        "sent": [dataclasses.asdict(one) for one in collectives],
        "floor": None if device is None else _least(counts, device),
        "compile_seconds": seconds,
    }


def summarize(
    rows: Sequence[dict[str, Any]], totals: dict[str, int], usable: int | None
) -> dict[str, Any]:
    """The peak of each phase beside the plan's, and the least time of a step.

    Args:
      rows: results of `measure`.
      totals: the plan's bytes by phase.
      usable: bytes of a device that arrays may fill; None if unknown.
    """
    made = [row for row in rows if "error" not in row]
    phases = {
        phase: {
            "peak": (peak := max(row["peak"] for row in of_phase)),
            "plan": totals.get(phase),
            "ratio": peak / totals[phase] if totals.get(phase) else None,
            "floor": _total(row["times"] * (row["floor"] or 0.0) for row in of_phase),
        }
        for phase in dict.fromkeys(row["phase"] for row in made)
        if (of_phase := [row for row in made if row["phase"] == phase])
    }
    peak = max((sizes["peak"] for sizes in phases.values()), default=0)
    complete = len(made) == len(rows)
    return {
        "programs": list(rows),
        "phases": phases,
        "peak": peak,
        "usable": usable,
        "fits": None if usable is None or not complete else peak <= usable,
        "floor": _total(sizes["floor"] or 0.0 for sizes in phases.values()),
    }


def _least(counts: dict[str, float], device: Device) -> float:
    """Seconds in which a device can compute, move or receive all this, at best."""
    times = [counts["flops"] / device.flops, counts["moved"] / device.bandwidth]
    if device.links is not None:
        times.append(counts["received"] / device.links)
    return max(times)


def _total(seconds: Iterable[float]) -> float | None:
    """The sum; None where there is no rate to compute it from."""
    return sum(seconds) or None
