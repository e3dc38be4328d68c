"""Peak memory of each program of a step as XLA plans it, compared with the estimate.

    python benchmarks/memory.py smol [--remat none dots layer]

Programs are compiled from shapes only: no weights are read, and nothing runs. The
estimate is that of `grpo-jax plan`, which a run also uses for its automatic choices.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from workloads import WORKLOADS, Workload, own_versions, publish, show, surroundings

from grpo_jax import make_train_step
from grpo_jax.config import SamplingConfig, TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning.memory import estimate
from grpo_jax.rollout.generate import generate
from grpo_jax.training.optimizer import make_optimizer
from grpo_jax.training.state import Batch, make_train_state
from grpo_jax.training.step import score_batch
from grpo_jax.weights.pretrained import read_model_config

MIB = 2**20


def main(
    workload: tyro.conf.Positional[str],
    *,
    models: Path = Path("benchmarks/models"),
    remat: tuple[str, ...] = ("none", "dots", "layer"),
    microbatch_size: int | None = None,
    out: Path | None = Path("benchmarks/results/memory.jsonl"),
) -> None:
    """Compile the programs of a workload; the last line is JSON.

    Args:
      workload: its name in workloads.py.
      models: the folder that models.py made.
      remat: what the backward pass computes again, one update for each.
      microbatch_size: sequences of an update held at once; all by default.
      out: a file to which the line is appended.
    """
    work = WORKLOADS[workload]
    model = read_model_config(str(work.folder(models)))
    rows = {}
    for choice in remat:
        config = run_config(work, choice, microbatch_size)
        compiled = {"update " + choice: update(model, config)}
        if choice == remat[0]:
            compiled |= {"rollout": rollout(model, config)}
            compiled |= {"score": score(model, config)}
        estimated = estimates(model, config)
        for name, size in compiled.items():
            expected = estimated[name.partition(" ")[0]]
            rows[name] = {
                "MiB": size / MIB,
                "estimate MiB": expected / MIB,
                "estimate / MiB": expected / size,
            }
    show(f"{workload}: temporaries and results besides the state", rows)
    line = {
        "benchmark": "memory",
        "workload": dataclasses.asdict(work),
        "microbatch_size": microbatch_size,
        "rows": rows,
        "device": jax.devices()[0].device_kind,
        "versions": own_versions(),
        **surroundings(),
    }
    publish(line, out)


def run_config(work: Workload, remat: Any, microbatch_size: int | None) -> TrainConfig:
    """The run whose programs these are."""
    return TrainConfig(
        model="benchmark",
        **work.sizes,
        microbatch_size=microbatch_size,
        compute_dtype="float32",
        remat=remat,
    )


def estimates(model: ModelConfig, config: TrainConfig) -> dict[str, int]:
    """Estimated bytes of each phase in addition to the state."""
    model = dataclasses.replace(model, remat=config.remat)
    mesh = meshes.abstract_mesh(config.mesh, 1)
    phases = estimate(model, config, mesh).phases
    return {name: sum(sizes.values()) for name, sizes in phases.items()}


def update(model: ModelConfig, config: TrainConfig) -> int:
    """Bytes of the train step, whose results take the place of the state."""
    decoder = Decoder(dataclasses.replace(model, remat=config.remat))
    tx = make_optimizer(config.optimizer, total_updates=1)
    state = jax.eval_shape(
        functools.partial(make_train_state, tx=tx), abstract_params(decoder)
    )
    step = jax.jit(make_train_step(decoder, tx, config), donate_argnums=0)
    return _needed(step.lower(state, batch(config)), results=False)


def score(model: ModelConfig, config: TrainConfig) -> int:
    """Bytes of the reference pass."""
    decoder = Decoder(model)
    variables = {"params": abstract_params(decoder)}
    program = jax.jit(functools.partial(score_batch, decoder, config))
    return _needed(program.lower(variables, batch(config)), results=True)


def rollout(model: ModelConfig, config: TrainConfig) -> int:
    """Bytes of sampling."""
    decoder = Decoder(model)

    def sample(params: Any, prompts: Any, lengths: Any, key: Any) -> Any:
        return generate(
            decoder,
            params,
            prompts,
            lengths,
            key,
            group_size=config.group_size,
            max_new_tokens=config.max_new_tokens,
            sampling=SamplingConfig(stop_ids=(2,)),
        )

    given = batch(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = abstract_params(decoder), given.prompts, given.prompt_lengths, key
    return _needed(jax.jit(sample).lower(*shapes), results=True)


def batch(config: TrainConfig) -> Batch:
    """Shapes of what a step learns from."""
    prompts, width = config.prompts_per_step, config.max_prompt_tokens
    shape = (prompts, config.group_size, config.max_new_tokens)
    array = jax.ShapeDtypeStruct
    return Batch(
        prompts=array((prompts, width), jnp.int32),
        prompt_lengths=array((prompts,), jnp.int32),
        completions=array(shape, jnp.int32),
        mask=array(shape, bool),
        advantages=array(shape[:2], jnp.float32),
        sampler_logp=array(shape, jnp.float32),
        ref_logp=array(shape, jnp.float32),
    )


def _needed(lowered: Any, *, results: bool) -> int:
    memory = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes + results * memory.output_size_in_bytes


if __name__ == "__main__":
    tyro.cli(main)
