"""This library, TRL and Tunix on the same work, in turn, and how they compare.

    benchmarks/peers/setup.sh                       # once: environments of their own
    python benchmarks/models.py --gguf FILE         # once: the models
    python benchmarks/compare.py tiny smol [--rounds 1]

Every system runs in a process of its own, one at a time, round after round. Prints a
table of seconds per phase with the ratio of each peer to this library, and last a line
of JSON. Every run is kept in benchmarks/results/.
"""

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from workloads import WORKLOADS

HERE = Path(__file__).parent
PHASES = ("rollout", "reference", "update", "step")


def main(
    workloads: tyro.conf.Positional[tuple[str, ...]] = ("tiny",),
    *,
    models: Path = HERE / "models",
    peers: Path = HERE / "peers",
    rounds: int = 1,
    bfloat16: bool = False,
    out: Path = HERE / "results" / "compare.jsonl",
) -> None:
    """Run all systems on the workloads.

    Args:
      workloads: their names in workloads.py.
      models: the folder that models.py made.
      peers: the folder in which setup.sh made the environments `trl` and `tunix`.
      rounds: how often each system runs.
      bfloat16: also run TRL with weights in bfloat16.
      out: where every run is appended.
    """
    summary = {}
    for work in workloads:
        found = defaultdict(list)
        for _ in range(rounds):
            for command in commands(work, models, peers, bfloat16=bfloat16):
                line = run([*command, "--out", str(out)])
                found[line["system"]].append(line)
        summary[work] = show(work, found)
    print(json.dumps(summary))


def commands(
    work: str, models: Path, peers: Path, *, bfloat16: bool
) -> list[list[str]]:
    """The command lines of all systems for a workload."""
    given = [work, "--models", str(models)]
    trl = [str(peers / "trl/bin/python"), str(HERE / "peers/trl_step.py"), *given]
    tunix = [str(peers / "tunix/bin/python"), str(HERE / "peers/tunix_step.py"), *given]
    # In one piece its update of `smol` needs 22 GiB, and is slower.
    tunix += ["--micro", "1"] if work.startswith("smol") else []
    own = [sys.executable, str(HERE / "step.py"), *given]
    chosen = [own, trl, tunix]
    if WORKLOADS[work].mean_tokens is not None:
        chosen.append([*own, "--carry-over"])
    return chosen + ([[*trl, "--dtype", "bfloat16"]] if bfloat16 else [])


def run(command: list[str]) -> dict:
    """The line of JSON that a run prints last."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(work: str, found: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Prints the table of a workload; returns seconds and ratios by system.

    The ratio of a system is that of tokens per second, since steps of geometric lengths
    have different numbers of tokens.
    """
    seconds = {
        system: {
            phase: statistics.median(line["seconds"][phase] for line in lines)
            for phase in PHASES
        }
        for system, lines in found.items()
    }
    speeds = {
        system: statistics.median(line["tokens_per_second"] for line in lines)
        for system, lines in found.items()
    }
    first = next(iter(seconds))
    own, tokens_per_second = seconds[first], speeds[first]
    table = Table(title=f"{work}: seconds, and ratio to this library")
    for name in ("system", *PHASES, "tokens/s", "peak GiB"):
        table.add_column(name, justify="left" if name == "system" else "right")
    for system, phases in seconds.items():
        cells = [f"{phases[p]:.3g} ({phases[p] / own[p]:.2f}x)" for p in PHASES]
        peak = max(line["peak_gib"] for line in found[system])
        speed = f"{speeds[system]:.0f} ({tokens_per_second / speeds[system]:.2f}x)"
        table.add_row(system, *cells, speed, f"{peak:.1f}")
    Console(width=120).print(table)
    return {
        system: phases | {"ratio": tokens_per_second / speeds[system]}
        for system, phases in seconds.items()
    }


if __name__ == "__main__":
    tyro.cli(main)
