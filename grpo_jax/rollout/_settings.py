"""How the completions of a prompt are drawn, whichever loop draws them."""

import dataclasses

from grpo_jax.config import SamplingConfig
from grpo_jax.models.limits import check_stop_ids
from grpo_jax.models.protocol import LanguageModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """The settings of a group; a static argument of compiled programs.

    Attributes:
      group_size: completions of a prompt, G.
      max_new_tokens: most tokens of a completion, T.
      sampling: how the next token is drawn.
      stop_ids: tokens that end a completion.
    """

    group_size: int
    max_new_tokens: int
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]


def group_settings(
    model: LanguageModelConfig,
    sampling: SamplingConfig,
    *,
    group_size: int,
    max_new_tokens: int,
) -> GroupSettings:
    """The settings for a model, whose stop tokens are used where `sampling` has none.

    Raises:
      ValueError: for a count below 1, or a stop token that the model does not have.
    """
    counts = {"group_size": group_size, "max_new_tokens": max_new_tokens}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
    stop_ids = sampling.stop_ids
    if stop_ids is None:
        stop_ids = model.eos_token_ids
    check_stop_ids(stop_ids, vocab_size=model.vocab_size)
    return GroupSettings(**counts, sampling=sampling, stop_ids=tuple(stop_ids))
