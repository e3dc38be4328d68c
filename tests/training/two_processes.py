"""One of several processes that train together; `test_processes` starts it.

    python two_processes.py MODEL FOLDER

The runs follow one another in one runtime. What this process saw of them is printed as
JSON, the last line of its output.
"""

import dataclasses
import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import (
    CheckpointConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    ReportConfig,
    RolloutConfig,
    TrainConfig,
    train,
)
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.processes import initialize_processes
from grpo_jax.training import loop

ROWS = [{"prompt": f"{a}+{b}="} for a in range(6) for b in range(6)]


def letters(completions, **_):
    return [float(sum(map(ord, text)) % 7) for text in completions]


def make_config(model, run_dir):
    return TrainConfig(
        model=model,
        run_dir=run_dir,
        steps=3,
        prompts_per_step=8,
        group_size=4,
        max_new_tokens=6,
        max_prompt_tokens=16,
        eval_every=3,
        eval_prompts=4,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=2),
        report=ReportConfig(completions_every=1),
    )


def in_step(number, act):
    """The reward, which acts on the last process when it is called in that step."""

    def letters_or_more(completions, trainer_state, **_):
        last = jax.process_index() == jax.process_count() - 1
        if last and trainer_state.global_step == number:
            act()
        return letters(completions)

    return letters_or_more


def fail():
    raise OSError("no disk left")


def connect():
    """Meet over all devices now: Gloo gives up when one process compiles for long."""
    mesh = meshes.make_mesh(MeshConfig())
    rows = meshes.to_mesh(mesh, np.ones(jax.local_device_count(), np.float32))
    jax.block_until_ready(jax.jit(jnp.sum)(rows))


def seen(result):
    return {
        "status": result.summary["status"],
        "steps": result.summary["steps"],
        "sha256": result.summary["params_sha256"],
        "lines": len(result.history),
    }


def refusal(config, **options):
    try:
        train(config, **options)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(model, folder):
    # Takes longer than a run, and says nothing about processes.
    loop.plot_runs = lambda runs, out: None
    initialize_processes(MeshConfig())
    connect()
    data = {"dataset": ROWS, "eval_dataset": ROWS[:3]}
    whole = make_config(model, f"{folder}/whole")
    stopped = make_config(model, f"{folder}/stopped")
    failed = make_config(model, f"{folder}/failed")
    terminate = in_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    uneven = dataclasses.replace(failed, prompts_per_step=6)
    wide = dataclasses.replace(failed, mesh=MeshConfig(fsdp=1, tensor=4))
    carried, halted = (
        dataclasses.replace(
            made, rollout=RolloutConfig(carry_over=True, slots=20), eval_every=0
        )
        for made in (
            make_config(model, f"{folder}/carried"),
            make_config(model, f"{folder}/halted"),
        )
    )
    adapted = dataclasses.replace(
        make_config(model, f"{folder}/adapted"), steps=1, lora=LoraConfig(rank=2)
    )
    report = {
        "adapted": seen(train(adapted, rewards=letters, dataset=ROWS)),
        "whole": seen(train(whole, rewards=letters, **data)),
        "stopped": seen(train(stopped, rewards=terminate, **data)),
        "resumed": seen(train(stopped, rewards=letters, **data)),
        "carried": seen(train(carried, rewards=letters, **data)),
        "carried_stopped": seen(train(halted, rewards=terminate, **data)),
        "carried_resumed": seen(train(halted, rewards=letters, **data)),
        "uneven": refusal(uneven, rewards=letters, **data),
        "wide": refusal(wide, rewards=letters, **data),
        "other": refusal(dataclasses.replace(whole, seed=1), rewards=letters, **data),
        "failed": refusal(failed, rewards=in_step(1, fail), **data),
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
