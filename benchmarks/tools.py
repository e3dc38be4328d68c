"""A step whose tools take time, against the same step with tools that take none.

    python experiments/tool_start.py
    python benchmarks/tools.py [--seconds 0.2] [--out FILE]

The model calls a tool in nearly half of its completions. Both runs draw the same
tokens, since what is drawn does not depend on the clock.
"""

import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro
from workloads import own_versions, publish, surroundings

from grpo_jax import OptimizerConfig, RolloutConfig, TrainConfig, train


def main(
    *,
    model: Path = Path("runs/tool-start"),
    seconds: float = 0.2,
    prompts: int = 32,
    group: int = 16,
    slots: int = 128,
    steps: int = 12,
    out: Path | None = Path("benchmarks/results/tools.jsonl"),
) -> None:
    """Measure steps with and without waiting; the last line is JSON.

    Args:
      model: made by experiments/tool_start.py.
      seconds: how long a call takes.
      prompts: of a step.
      group: completions of a prompt.
      slots: completions that decode together.
      steps: of each run, of which the second half counts.
      out: a file to which the line is appended.
    """
    sizes = {"prompts_per_step": prompts, "group_size": group, "steps": steps}
    runs = [_run(model, wait, slots, sizes)[-(steps // 2) :] for wait in (0.0, seconds)]
    line: dict[str, Any] = {"benchmark": "tools", "seconds": seconds, "slots": slots}
    line |= sizes
    for name in ("tools/call_frequency", "completions/mean_length"):
        line[name] = [statistics.mean(each[name] for each in run) for run in runs]
    for name in ("time/rollout", "time/step"):
        without, wait = (statistics.median(e[name] for e in run) for run in runs)
        line[name] = {"without": without, "with": wait, "ratio": wait / without}
    publish(line | {"versions": own_versions(), **surroundings()}, out)


def _run(
    model: Path, wait: float, slots: int, sizes: dict[str, Any]
) -> list[dict[str, Any]]:
    def product(of: str) -> int:
        """Multiplies whole numbers.

        Args:
            of: The numbers, with * between them, such as 12*34.
        """
        time.sleep(wait)
        return math.prod(map(int, of.split("*")))

    draw = random.Random(0)
    rows = [
        {"prompt": f"{draw.randrange(32, 100)}*{draw.randrange(32, 100)}"}
        for _ in range(500)
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=str(model),
            run_dir=folder,
            max_new_tokens=40,
            eval_prompts=0,
            rollout=RolloutConfig(slots=slots),
            # The policy stays as it is, nearly.
            optimizer=OptimizerConfig(learning_rate=1e-12),
            **sizes,
        )
        result = train(config, dataset=rows, rewards=_messages, tools=[product])
    return result.history


def _messages(completions, **columns):
    """Any reward: the number of messages."""
    return [float(len(messages)) for messages in completions]


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
