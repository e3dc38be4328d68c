"""What a model has room for: lengths, token ids, and the sizes of its sampler."""

from collections.abc import Iterable

from grpo_jax.models.decoder import Decoder
from grpo_jax.models.protocol import LanguageModel


def longest_prompt(max_prompt_tokens: int, *, new_tokens: int, context: int) -> int:
    """How many tokens a prompt may have so that its completions fit the context.

    Raises:
      ValueError: if `new_tokens` leave no room for a prompt.
    """
    if new_tokens >= context:
        raise ValueError(
            f"max_new_tokens {new_tokens} leaves no room for a prompt in the model's "
            f"context of {context} tokens; lower max_new_tokens."
        )
    return min(max_prompt_tokens, context - new_tokens)


def cache_columns(max_new_tokens: int, longest: int) -> int:
    """Columns of the sampler's cache when the longest sequence has `longest` tokens.

    A fourth, a half or all of the limit: what is read follows what is written, with few
    programs to compile.
    """
    fourth = max(-(-max_new_tokens // 4), 32)
    columns = min(fourth, max_new_tokens)
    while columns < longest:
        columns = min(2 * columns, max_new_tokens)
    return columns


def prompt_rows(prompts: int) -> int:
    """Rows of the sampler's block of prompts, at most a fourth more than are needed.

    1 to 8, 10, 12, 14, 16, 20 and so on, so that few programs are compiled.
    """
    step = max((1 << (prompts - 1).bit_length()) // 8, 1)
    return -(-prompts // step) * step


def check_stop_ids(stop_ids: Iterable[int], *, vocab_size: int) -> None:
    """Raises ValueError for stop tokens that can never be drawn."""
    unknown = [index for index in stop_ids if index >= vocab_size]
    if unknown:
        raise ValueError(
            f"sampling.stop_ids {', '.join(map(str, unknown))}: the model's token ids "
            f"end at {vocab_size - 1}, so no completion would end there; give ids of "
            "this model."
        )


def experts_per_token(model: LanguageModel) -> int:
    """The experts that each token of a mixture passes through.

    Raises:
      ValueError: for a model without experts in every layer.
    """
    if isinstance(model, Decoder) and model.config.mixer is None:
        if (experts := model.config.experts) is not None:
            return experts.per_token
    raise ValueError(
        "objective.router_aux_loss_coef needs a model with experts, such as Mixtral; "
        "set it to 0"
    )
