"""A run directory made up for tests of the reports, hostile model text included."""

import json
from pathlib import Path

import numpy as np

from grpo_jax.config import ReportConfig
from grpo_jax.reporting.trackers import make_tracker

# What a model may write to break out of a terminal, a page or rich's markup.
HOSTILE = (
    "[/INST] [bold]loud[/bold] :smile:",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 bell\x07 \x9b2J",
    "pay \u202e000,1\u202c now \u2066x\u2069 \u2028 line",
    "</script><script>document.title='broken'</script>",
    "<img src=x onerror=\"document.title='broken'\"> <!-- & &lt; ]]>",
    "half a pair \ud83d, a nul \x00, back\\slash \"quotes\" 'single'",
)


def talk(*, text: str = "9591", reward: float = 1.0) -> dict:
    """A row of completions whose policy called a tool twice, of which one failed."""
    calls = [
        {"type": "function", "function": {"name": "calculate", "arguments": given}}
        for given in ({"expression": "417*23"}, {"expression": "1/0"})
    ]
    return {
        "step": 1,
        "prompt": [{"role": "user", "content": "What is 417 * 23?"}],
        "completion": [
            {"role": "assistant", "content": "I ask.", "tool_calls": calls},
            {"role": "tool", "name": "calculate", "content": text},
            {"role": "tool", "name": "calculate", "content": "{'error': 'by zero'}"},
            {"role": "assistant", "content": "It is 9591."},
        ],
        "rewards": {"correct": reward, "Game": None},
        "reward": reward,
        "advantage": 0.5,
        "length": 12,
        "finished": True,
        "turns": 2,
        "calls": 2,
        "failed_calls": 1,
        "tool_seconds": 0.25,
        "failed": False,
        "dropped_answers": False,
    }


def write_run(
    run_dir: Path,
    *,
    steps: int = 120,
    seed: int = 0,
    evaluations: bool = True,
    completions: bool = True,
) -> Path:
    """A finished run whose reward rises; gives back its directory."""
    rng = np.random.default_rng(seed)
    tracker = make_tracker(ReportConfig(), run_dir)
    if evaluations:
        tracker.log({"eval/accuracy": 0.1}, 0)
    for step in range(1, steps + 1):
        line = _metrics(step / steps, rng)
        if evaluations and (step % 20 == 0 or step == steps):
            line["eval/accuracy"] = 0.1 + 0.75 * step / steps
        tracker.log(line, step)
        if completions and step % 10 == 0:
            tracker.log_completions(_rows(step, rng), step)
    tracker.close()
    (run_dir / "config.yaml").write_text(
        f"model: embedded\ntask: arithmetic\nsteps: {steps}\nseed: {seed}\n"
        "objective:\n  advantage: softmax\n  kl_coef: 0.04\n"
    )
    manifest = {
        "status": "finished",
        "seed": seed,
        "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8"},
        "devices": ["cpu:0"],
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    }
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    summary = {"steps": steps, "seconds": 203.5, "params_sha256": "0" * 64}
    if evaluations:
        summary |= {"accuracy_before": 0.1, "accuracy_after": 0.85}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    return run_dir


def _metrics(progress: float, rng: np.random.Generator) -> dict[str, float]:
    noise = rng.normal(size=6)
    return {
        "reward": 0.15 + 0.7 * progress + 0.05 * noise[0],
        "reward_std": 0.35 - 0.2 * progress + 0.01 * noise[1],
        "frac_reward_zero_std": 0.2 + 0.5 * progress,
        "kl": 0.02 * progress**2 * (1 + 0.2 * noise[2]),
        "completions/mean_length": 40 - 20 * progress + noise[3],
        "completions/clipped_ratio": max(0.0, 0.2 - 0.2 * progress + 0.01 * noise[4]),
        "grad_norm": 0.8 + 0.2 * abs(noise[5]),
        "tokens_per_second/total": 5200 + 100 * noise[1],
        "time/rollout": 0.8,
    }


def _rows(step: int, rng: np.random.Generator) -> list[dict]:
    rows = []
    for index in range(16):
        a, b = rng.integers(10, 90, size=2)
        right = bool(rng.random() < step / 130)
        answer = a + b if right else a + b + rng.integers(1, 9)
        text = f"{a} + {b} is the same as {a + b // 10 * 10} + {b % 10}.\n#### {answer}"
        hostile = index == 3  # and the worst of its step
        if hostile:
            text = HOSTILE[(step // 10) % len(HOSTILE)]
        reward = 1.0 if right and not hostile else 0.0
        rows.append(
            {
                "step": step,
                "prompt": f"What is {a} + {b}?",
                "completion": text,
                "rewards": {"correct": reward, "format": 0.0 if hostile else 0.5},
                "reward": 0.0 if hostile else reward + 0.5 - 0.01 * index,
                "advantage": reward - 0.4,
                "length": len(text),
                "finished": not hostile,
            }
        )
    return rows
