"""GRPO on GSM8K with a pretrained model.

    python experiments/gsm8k.py --model Qwen/Qwen2.5-0.5B-Instruct
    python experiments/gsm8k.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data DIR

`--data` is a folder with train.jsonl and test.jsonl (question, answer). Without it the
rows come from the hub.

Hardware: one accelerator for a real run. On 2 CPU cores the defaults below run 3 steps
of a 135M model, to check that everything works.
Time: about three minutes on 2 CPU cores.
Expected result: finite losses, sampler_logp_diff/max below 1e-3, seconds per phase.
"""

from dataclasses import dataclass

import jax
import tyro

from grpo_jax import OptimizerConfig, TrainConfig, train


@dataclass(frozen=True)
class Options:
    """The options; None chooses a value for the hardware."""

    model: str
    data: str | None = None
    steps: int | None = None
    prompts_per_step: int | None = None
    group_size: int = 8
    max_new_tokens: int | None = None
    learning_rate: float = 1e-6
    eval_prompts: int | None = None
    seed: int = 0
    run_dir: str | None = None


def main(options: Options) -> None:
    """Train, then print the time of each phase."""
    on_cpu = jax.default_backend() == "cpu"
    config = TrainConfig(
        model=options.model,
        task="gsm8k",
        data=options.data,
        seed=options.seed,
        run_dir=options.run_dir,
        steps=options.steps or (3 if on_cpu else 200),
        prompts_per_step=options.prompts_per_step or (2 if on_cpu else 16),
        group_size=options.group_size,
        max_new_tokens=options.max_new_tokens or (64 if on_cpu else 300),
        eval_prompts=_or(options.eval_prompts, 0 if on_cpu else 1319),
        optimizer=OptimizerConfig(learning_rate=options.learning_rate),
    )
    history = train(config).history
    for line in history:
        phases = {name: line.get(f"time/{name}") for name in PHASES}
        spent = "  ".join(f"{name} {t:.1f} s" for name, t in phases.items() if t)
        if "loss" in line:
            largest = line["sampler_logp_diff/max"]
            print(f"step {line['step']}  loss {line['loss']:.2e}  ", end="")
            print(f"sampler_logp_diff/max {largest:.1e}  {spent}")


PHASES = ("rollout", "reward", "score", "update")


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
