"""Seconds of the three phases of a step, on random weights and random tokens."""

import functools
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from machine import best
from workloads import Workload

from grpo_jax.config import MeshConfig, SamplingConfig, TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, init_params, param_axes
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout.generate import generate
from grpo_jax.rollout.rollout import Rollout
from grpo_jax.training.learner import Learner


def phases(
    model: ModelConfig,
    work: Workload,
    mesh: MeshConfig,
    *,
    repeats: int = 3,
    microbatch_size: int | None = None,
) -> dict[str, float]:
    """Least seconds of rollout, reference pass and update, full-length completions."""
    decoder, made = Decoder(model), meshes.make_mesh(mesh)
    config = TrainConfig(
        model="benchmark",
        **work.sizes,
        microbatch_size=microbatch_size,
        mesh=mesh,
    )
    with jax.set_mesh(made), nn.logical_axis_rules(meshes.RULES):
        init = functools.partial(init_params, decoder)
        shapes = jax.eval_shape(init, jax.random.key(0))
        places = meshes.parameter_shardings(param_axes(decoder), shapes, made)
        params = jax.jit(init, out_shardings=places)(jax.random.key(0))
        learner = Learner(decoder, params, config, made)
        rollout = random_rollout(work, model.vocab_size)
        sent = meshes.to_mesh(made, (rollout.prompts, rollout.prompt_lengths))

        def sample() -> Any:
            return generate(
                decoder,
                learner.sampler_variables()["params"],
                *sent,
                jax.random.key(1),
                group_size=work.group,
                max_new_tokens=work.new_tokens,
                sampling=SamplingConfig(stop_ids=()),
            )

        batch = learner.score(rollout)
        rewarded = learner.with_advantages(batch, rollout)
        return {
            "rollout": best(sample, repeats=repeats),
            "reference": best(learner.score, rollout, repeats=repeats),
            "update": best(learner.update, rewarded, repeats=repeats),
        }


def random_rollout(work: Workload, vocabulary: int) -> Rollout:
    """Full-length prompts and completions of random tokens."""
    rng = np.random.default_rng(0)
    shape = (work.prompts, work.group, work.new_tokens)
    draw = functools.partial(rng.integers, 2, vocabulary, dtype=np.int32)
    return Rollout(
        rows=[{}] * work.prompts,
        prompts=draw((work.prompts, work.prompt_tokens)),
        prompt_lengths=np.full(work.prompts, work.prompt_tokens, np.int32),
        tokens=draw(shape),
        logp=np.full(shape, -9.0, np.float32),
        lengths=np.full(shape[:2], work.new_tokens, np.int32),
        finished=np.ones(shape[:2], bool),
        mask=np.ones(shape, bool),
        completions=[[""] * work.group] * work.prompts,
        keep=np.ones(work.prompts, bool),
        rewards=rng.normal(size=shape[:2]),
    )
