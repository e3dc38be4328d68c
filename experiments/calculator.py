"""A tool learned: products that the model cannot compute alone, with a calculator.

    python experiments/tool_start.py
    python experiments/calculator.py
    python experiments/calculator.py --model Qwen/Qwen2.5-1.5B-Instruct

Hardware: 2 CPU cores. Time: a few minutes for each of the first two commands.
Result: right answers, and calls per completion, before and after.
"""

import random

import tyro

from grpo_jax import OptimizerConfig, TrainConfig, train


def times(a: int, b: int) -> int:
    """Multiplies two whole numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


def right(completions, answer, **columns):
    """1 if the last message is the answer, else 0."""
    last = [messages[-1]["content"] for messages in completions]
    return [float(text.strip() == a) for text, a in zip(last, answer, strict=True)]


def main(
    model: str = "runs/tool-start",
    steps: int = 40,
    seed: int = 0,
    run_dir: str | None = None,
) -> None:
    """Train with the tool, then print right answers and calls before and after."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    rows = [
        {"prompt": [{"role": "user", "content": f"{a}*{b}"}], "answer": str(a * b)}
        for a, b in pairs
    ]
    config = TrainConfig(
        model=model,
        steps=steps,
        seed=seed,
        run_dir=run_dir or f"runs/calculator-{seed}",
        prompts_per_step=16,
        max_new_tokens=110,
        eval_every=10,
        eval_prompts=200,
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=5),
    )
    result = train(
        config,
        dataset=rows[500:],
        rewards=right,
        eval_dataset=rows[:500],
        tools=[times],
    )
    summary, calls = result.summary, "tools/call_frequency"
    before, after = summary["eval_reward_before"], summary["eval_reward_after"]
    first, last = result.history[1], result.history[-1]
    print(f"right answers {before:.3f} -> {after:.3f}")
    print(f"calls per completion {first[calls]:.2f} -> {last[calls]:.2f}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
