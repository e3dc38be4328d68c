"""The compiled programs of a run that apply the model to tokens.

The sampler's `prefill`, which fills the prompts that `advance` holds, counts with it.
Other compiled programs only copy or add arrays that these hold, or smaller arrays.
"""

from collections.abc import Iterator
from typing import NamedTuple

from grpo_jax.config import TrainConfig


class Program(NamedTuple):
    """A compiled function and its batch, counted over all devices.

    Attributes:
      function: its name, as JAX reports it.
      phase: the phase of the run, as in an estimate of memory.
      prompts: the number of prompts in its arrays.
      completions: the number of completions of each prompt.
      slots: of the sampler, the number of completions that decode together.
    """

    function: str
    phase: str
    prompts: int
    completions: int
    slots: int = 0


def training_programs(config: TrainConfig) -> Iterator[Program]:
    """The programs of a step, in the order in which it runs them."""
    prompts, group = config.prompts_per_step, config.group_size
    slots = config.rollout.slots or prompts * group
    # With carry_over the prompts of later steps wait as well.
    most = None if config.rollout.carry_over else prompts
    yield _sampling("rollout", slots, group, most=most)
    if config.objective.kl_coef or config.updates_per_step > 1:
        yield Program("score_batch", "score", prompts, group)
    yield Program("step", "update", prompts // config.minibatches, group)


def evaluation_program(prompts: int, *, of: int) -> Program:
    """The program that completes `prompts` of the `of` held-out prompts at once."""
    return _sampling("evaluation", prompts, 1, most=of)


def _sampling(phase: str, slots: int, group: int, *, most: int | None) -> Program:
    # The sampler computes prompts for half as many further completions, so that a slot
    # is filled as soon as it is free.
    prompts = -(-(slots + slots // 2) // group)
    if most is not None:
        prompts, slots = min(prompts, most), min(slots, most * group)
    return Program("advance", phase, prompts, group, slots)
