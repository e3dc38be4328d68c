"""The compiled programs of a run that apply the model to tokens.

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
    """

    function: str
    phase: str
    prompts: int
    completions: int


def training_programs(config: TrainConfig) -> Iterator[Program]:
    """The programs of a step, in the order in which it runs them."""
    prompts, group = config.prompts_per_step, config.group_size
    yield Program("_generate", "rollout", prompts, group)
    if config.objective.kl_coef or config.updates_per_step > 1:
        yield Program("score_batch", "score", prompts, group)
    yield Program("step", "update", prompts // config.minibatches, group)


def evaluation_program(prompts: int) -> Program:
    """The program that completes this number of held-out prompts at once."""
    return Program("_generate", "evaluation", prompts, 1)
