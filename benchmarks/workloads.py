"""What the benchmarks run: the same work for this library and for its peers.

Nothing here imports JAX or PyTorch: each script pays for its own framework only.
"""

import json
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

WORDS = (
    "time year people way day man thing woman life child world school state family "
    "student group country problem hand part place case week company system program "
    "question work government number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head "
    "house service friend father power hour game line end member law car city name"
).split()

# The model that comes with the package.
EMBEDDED = Path(__file__).parents[1] / "grpo_jax" / "assets" / "arithmetic-1m"


@dataclass(frozen=True)
class Workload:
    """A step: `prompts` x `group` completions of exactly `new_tokens` tokens.

    Every prompt has exactly `prompt_tokens`. `model` is a folder that `models.py`
    makes, or the name of the model that comes with the package. With `mean_tokens`
    completions have geometric lengths of that mean, and `new_tokens` is their limit.
    """

    name: str
    model: str
    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    kl_coef: float = 0.04
    mean_tokens: int | None = None

    def folder(self, models: Path) -> Path:
        """Where the model lies."""
        return EMBEDDED if self.model == EMBEDDED.name else models / self.model

    @property
    def sizes(self) -> dict[str, int]:
        """The fields of a `TrainConfig` that say the same."""
        return {
            "prompts_per_step": self.prompts,
            "group_size": self.group,
            "max_prompt_tokens": self.prompt_tokens,
            "max_new_tokens": self.new_tokens,
        }

    @property
    def sequences(self) -> int:
        """Completions of a step."""
        return self.prompts * self.group

    @property
    def tokens(self) -> int:
        """Tokens that a step samples, if all completions run to the limit."""
        return self.sequences * self.new_tokens

    def stop_ids(self, vocabulary: int) -> tuple[int, ...]:
        """Tokens that end a completion: a model with random weights takes all alike.

        With k of V tokens the lengths are geometric with mean V / k.
        """
        if self.mean_tokens is None:
            return ()
        count = round(vocabulary / self.mean_tokens)
        return tuple(sorted(random.Random(0).sample(range(3, vocabulary), count)))

    def check(self, lengths: Sequence[int]) -> None:
        """Refuses completions of other lengths than those that were asked for."""
        if self.mean_tokens is None:
            assert set(lengths) == {self.new_tokens}, lengths
        else:
            mean = statistics.mean(lengths)
            assert 0.5 < mean / self.mean_tokens < 1.5, mean


WORKLOADS = {
    work.name: work
    for work in (
        # As in a default run, but all completions as long as its limit.
        Workload("embedded", EMBEDDED.name, 32, 8, 6, 8, steps=24),
        Workload("tiny", "tiny", 8, 8, 32, 32, steps=14),
        Workload("smol", "smol", 4, 8, 128, 64, steps=4),
        Workload("tiny-geometric", "tiny", 8, 8, 32, 128, steps=14, mean_tokens=32),
        Workload("smol-geometric", "smol-0", 4, 8, 128, 256, steps=4, mean_tokens=64),
        Workload("long", "tiny", 4, 16, 512, 64, steps=6),
    )
}


def exact_prompts(
    encode: Callable[[str], Sequence[int]], count: int, tokens: int, *, seed: int = 0
) -> list[str]:
    """Texts of which each has exactly `tokens` tokens."""
    rng = random.Random(seed)
    plain = [word for word in WORDS if len(encode(f"the {word}")) == 2]
    plain = plain or WORDS
    texts = []
    while len(texts) < count:
        words: list[str] = []
        while len(encode(" ".join(words))) < tokens:
            words.append(rng.choice(plain))
        text = " ".join(words)
        if len(encode(text)) == tokens:
            texts.append(text)
    return texts


def reward(completions: Iterable[str]) -> list[float]:
    """Cheap, and different within a group: the share of distinct characters."""
    return [len(set(text)) / 30 for text in completions]


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of every number over the rows."""
    return {
        name: statistics.median(row[name] for row in rows)
        for name in rows[0]
        if isinstance(rows[0][name], int | float)
    }


def record(
    system: str, work: Workload, rows: Sequence[dict[str, float]], **more: Any
) -> dict[str, Any]:
    """One line of results, with all that they depend on.

    Args:
      rows: for each step the seconds of each phase, and the "tokens" that it sampled.
    """
    phases = medians(rows)
    del phases["tokens"]
    speed = statistics.median(row["tokens"] / row["step"] for row in rows)
    return {
        "system": system,
        "workload": asdict(work),
        "seconds": {name: round(value, 4) for name, value in phases.items()},
        "tokens_per_second": round(speed, 2),
        "peak_gib": round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2
        ),
        **more,
        **surroundings(),
    }


def surroundings() -> dict[str, Any]:
    """The other conditions of every result: host, versions and date."""
    return {
        "machine": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
        },
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def own_versions() -> dict[str, str]:
    """Versions of this library and of what it stands on."""
    return versions("grpo-jax", "jax", "jaxlib", "flax", "optax")


def versions(*names: str) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def publish(line: dict[str, Any], out: Path | None) -> None:
    """Print a result as one JSON line, and append it to `out`."""
    text = json.dumps(line)
    print(text, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(text + "\n")


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print a table; columns are the names in the rows, in order of appearance."""
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table()
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name, row in rows.items():
        cells = (row.get(column, "") for column in columns)
        table.add_row(name, *(_cell(value) for value in cells))
    console = Console(width=100)
    console.print(title, highlight=False)
    console.print(table)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cpu_name() -> str:
    for row in Path("/proc/cpuinfo").read_text().splitlines():
        if row.startswith("model name"):
            return row.split(":", 1)[1].strip()
    return platform.processor()
