"""What a plan counts is what a run compiles; an evaluation stays within it."""

import dataclasses
import logging
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.config import (
    LoraConfig,
    MeshConfig,
    ObjectiveConfig,
    RolloutConfig,
    TrainConfig,
)
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning._programs import (
    evaluation_program,
    training_programs,
)
from grpo_jax.planning.advice import _memory_savings
from grpo_jax.planning.memory import estimate, evaluation_batch, is_evaluated
from grpo_jax.training._lowered import lowered_programs
from grpo_jax.training.loop import train

ROWS = [{"prompt": "ab" * (1 + i % 3), "wanted": "a"} for i in range(24)]


def share(completions, wanted, **_):
    return [text.count("a") for text in completions]


@pytest.fixture
def compiled(monkeypatch):
    """Programs as JAX compiles them: names, with the arrays that they take."""
    found = []

    class Listener(logging.Handler):
        def emit(self, record):
            if record.msg.startswith("Compiling %s with global shapes"):
                name, arrays, _ = record.args
                found.append((re.search(r"jit[(_](\w+)", str(name))[1], arrays))

    logger, listener = logging.getLogger("jax._src.interpreters.pxla"), Listener()
    monkeypatch.setattr(logger, "propagate", False)
    # Takes as long as the run.
    monkeypatch.setattr("grpo_jax.training.loop.plot_runs", lambda runs, out: None)
    logger.addHandler(listener)
    with jax.log_compiles():
        yield found
    logger.removeHandler(listener)


def batch_of(name, arrays, model):
    """Prompts and completions of what takes the embedding and tokens; else None."""
    embedding = (model.vocab_size, model.hidden_size)
    tokens = [a.shape for a in arrays if a.dtype == jnp.int32 and len(a.shape) > 1]
    # It computes the prompts of `advance`, of which the plan speaks.
    if name == "prefill" or embedding not in [a.shape for a in arrays] or not tokens:
        return None
    if name == "advance":  # parts x slots
        return next(math.prod(shape) for shape in tokens if len(shape) == 2), None
    groups = [shape[1] for shape in tokens if len(shape) == 3]
    return tokens[0][0], groups[0] if groups else None


NAMES = {
    "decode": "advance",
    "score": "score_batch",
    "update": "step",
}


def was_compiled(program, compiled):
    """Whether a run compiled such a program, from arrays that are among its own."""
    own = Counter((x.shape, x.dtype) for x in jax.tree.leaves(program.lower().in_avals))
    name = NAMES[program.name]
    # JAX leaves out arrays that a program does not read.
    return any(
        arrays and Counter((a.shape, a.dtype) for a in arrays) <= own
        for other, arrays in compiled
        if other == name
    )


# Each with a length of its own, so that none finds a program of another.
RUNS = {
    "all": {
        "max_new_tokens": 5,
        "prompts_per_step": 16,
        "minibatches": 2,
        "eval_prompts": 24,
        "eval_batch_size": 8,
    },
    "few slots": {
        "max_new_tokens": 6,
        "rollout": RolloutConfig(slots=8),
        "eval_every": 0,
    },
    "more rows than a rollout has": {"max_new_tokens": 3, "eval_prompts": 24},
    "least": {
        "max_new_tokens": 7,
        "eval_every": 0,
        "objective": ObjectiveConfig(kl_coef=0.0),
        "lora": LoraConfig(rank=2, targets=("q",)),
    },
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_plan_counts_every_program_that_a_run_compiles(
    compiled, tiny_policy, tmp_path, changes
):
    values = {"prompts_per_step": 8, "group_size": 2, "eval_every": 1}
    config = TrainConfig(
        model=str(tiny_policy.folder),
        run_dir=str(tmp_path / "run"),
        steps=1,
        max_prompt_tokens=16,
        remat="none",
        **values | changes,
    )
    train(config, dataset=ROWS, rewards=share, eval_dataset=ROWS)
    model = dataclasses.replace(tiny_policy.model.config, remat="none")
    mesh = meshes.abstract_mesh(config.mesh, jax.device_count())
    planned = list(training_programs(config))
    if is_evaluated(config):
        batch = evaluation_batch(model, config, mesh)
        assert batch < len(ROWS)
        planned.append(evaluation_program(batch, of=len(ROWS)))
    made = {
        (one.function, one.slots, None)
        if one.function == "advance"
        else (one.function, one.prompts, one.completions)
        for one in planned
    }
    seen = {
        (name, *batch)
        for name, arrays in compiled
        if (batch := batch_of(name, arrays, model)) is not None
    }
    assert seen == made
    layout = dataclasses.replace(config.mesh, sampler="gathered")
    described = dataclasses.replace(config, mesh=layout)
    own_mesh, ran = meshes.make_mesh(config.mesh), list(compiled)
    for program in lowered_programs(model, described, own_mesh):
        # Another run may have compiled those that have no lengths of completions.
        assert program.name not in NAMES or was_compiled(program, ran), program.name
    assert [one.phase for one in planned] == list(estimate(model, config, mesh).phases)


SIZES = {
    "short prompts": {"max_prompt_tokens": 8, "max_new_tokens": 64},
    "long prompts": {"max_prompt_tokens": 100, "max_new_tokens": 8},
    "small updates": {"microbatch_size": 4, "max_prompt_tokens": 64},
    "offloaded": {"mesh": MeshConfig(offload=("optimizer", "reference"))},
    "adapters": {"lora": LoraConfig(rank=2), "max_prompt_tokens": 64},
    "few rows": {"eval_prompts": 3},
}


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
def test_an_evaluation_is_as_large_as_training_leaves_room_for(tiny_policy, changes):
    values = {"prompts_per_step": 8, "group_size": 8, "max_new_tokens": 16}
    config = TrainConfig(**{"model": "tiny", "eval_prompts": 500} | values | changes)
    model, mesh = (
        tiny_policy.model.config,
        meshes.abstract_mesh(MeshConfig(data=2, fsdp=1), 2),
    )
    bare = estimate(model, dataclasses.replace(config, eval_every=0), mesh)
    assert "evaluation" not in bare.phases
    made = estimate(model, config, mesh)
    assert made.peak == bare.peak >= made.total("evaluation")
    batch, most = evaluation_batch(model, config, mesh), min(64, config.eval_prompts)
    assert 1 <= batch <= most
    if batch < most:
        twice = dataclasses.replace(config, eval_batch_size=2 * batch)
        assert estimate(model, twice, mesh).peak > made.peak


def test_a_batch_that_is_asked_for_is_counted_and_what_would_do_is_told(tiny_policy):
    config = TrainConfig(
        model="tiny",
        prompts_per_step=2,
        group_size=2,
        max_prompt_tokens=100,
        max_new_tokens=8,
        eval_batch_size=128,
    )
    model, mesh = tiny_policy.model.config, meshes.abstract_mesh(MeshConfig(fsdp=1), 1)
    made = estimate(model, config, mesh)
    assert made.peak == made.total("evaluation") > 3 * made.total("update")
    name, saved = next(iter(_memory_savings(model, config, mesh).items()))
    batch = evaluation_batch(
        model, dataclasses.replace(config, eval_batch_size=None), mesh
    )
    assert name == f"--eval-batch-size {batch}" and 1 <= batch <= 4
    assert made.peak - saved == max(made.total(x) for x in ("rollout", "update"))
