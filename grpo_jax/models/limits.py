"""What a model has room for: lengths and token ids that a run asks of it."""

from collections.abc import Iterable


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


def check_stop_ids(stop_ids: Iterable[int], *, vocab_size: int) -> None:
    """Raises ValueError for stop tokens that can never be drawn."""
    unknown = [index for index in stop_ids if index >= vocab_size]
    if unknown:
        raise ValueError(
            f"sampling.stop_ids {', '.join(map(str, unknown))}: the model's token ids "
            f"end at {vocab_size - 1}, so no completion would end there; give ids of "
            "this model."
        )
