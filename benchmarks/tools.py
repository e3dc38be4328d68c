"""A step whose tools take time, against the same step with tools that take none.

    python experiments/tool_start.py
    python benchmarks/tools.py [--seconds 0.2] [--out FILE]

The model calls a tool in about half of its completions. Both runs draw the same tokens,
since what is drawn does not depend on the clock.
"""

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro
from workloads import own_versions, publish, surroundings

from grpo_jax import OptimizerConfig, TrainConfig, train


def main(
    *,
    model: Path = Path("runs/tool-start"),
    seconds: float = 0.2,
    prompts: int = 16,
    group: int = 8,
    steps: int = 12,
    out: Path | None = Path("benchmarks/results/tools.jsonl"),
) -> None:
    """Measure steps with and without waiting; the last line is JSON.

    Args:
      model: made by experiments/tool_start.py.
      seconds: how long a call takes.
      prompts: of a step.
      group: completions of a prompt.
      steps: of each run, of which the second half counts.
      out: a file to which the line is appended.
    """
    sizes: dict[str, Any] = {
        "prompts_per_step": prompts,
        "group_size": group,
        "steps": steps,
    }
    runs = {wait: _run(model, wait, sizes) for wait in (0.0, seconds)}
    kept = {wait: history[-(steps // 2) :] for wait, history in runs.items()}
    median = {
        name: [statistics.median(h[name] for h in kept[wait]) for wait in kept]
        for name in ("time/rollout", "time/step")
    }
    lengths = [[h["completions/mean_length"] for h in kept[wait]] for wait in kept]
    line = {
        "benchmark": "tools",
        "seconds": seconds,
        **sizes,
        "calls": statistics.mean(h["tools/call_frequency"] for h in kept[seconds]),
        "same tokens": lengths[0] == lengths[1],
        **{name: {"without": a, "with": b} for name, (a, b) in median.items()},
        "ratio of steps": median["time/step"][1] / median["time/step"][0],
        "ratio of rollouts": median["time/rollout"][1] / median["time/rollout"][0],
        "versions": own_versions(),
        **surroundings(),
    }
    publish(line, out)


def _run(model: Path, wait: float, sizes: dict[str, Any]) -> list[dict[str, Any]]:
    def times(a: int, b: int) -> int:
        """Multiplies two whole numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        time.sleep(wait)
        return a * b

    pairs = [divmod(x, 100) for x in random.Random(0).sample(range(1010, 9999), 500)]
    rows = [{"prompt": [{"role": "user", "content": f"{a}*{b}"}]} for a, b in pairs]
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=str(model),
            run_dir=folder,
            max_new_tokens=110,
            eval_prompts=0,
            # The policy stays as it is, nearly.
            optimizer=OptimizerConfig(learning_rate=1e-12),
            **sizes,
        )
        result = train(config, dataset=rows, rewards=_length, tools=[times])
    return result.history


def _length(completions, **columns):
    """Any reward: the number of messages."""
    return [float(len(messages)) for messages in completions]


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
