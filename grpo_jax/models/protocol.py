"""LanguageModel: all that sampling, scoring and training ask of a model.

`Decoder` is one. Any Flax Linen module with these members trains as well: no other
attribute is read, and `forward` or the like is not needed.
"""

from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int, PyTree

# Names of parameters that stay in float32 under any compute dtype: scales of norms,
# routers, where rounding could choose another expert, and what decays are made of.
FLOAT32_PARAMS = ("scale", "router", "log_rate", "rate_bias")


class LanguageModelConfig(Protocol):
    """The facts about a model that the library reads."""

    @property
    def vocab_size(self) -> int:
        """Rows of the head's logits; token ids of prompts must lie below it."""
        ...

    @property
    def max_position_embeddings(self) -> int:
        """Most tokens of a prompt with its completion."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion where the sampling names none of its own."""
        ...

    @property
    def pad_token_id(self) -> int | None:
        """What fills the end of sampled rows; None is 0. Never compared with."""
        ...

    @property
    def dtype(self) -> str:
        """Name of the number type of compute.

        Sampling casts every parameter to it once, except `FLOAT32_PARAMS`.
        """
        ...

    @property
    def logit_softcap(self) -> float | None:
        """The c of c tanh(x / c) on the product with the head, or None."""
        ...


class LanguageModel(Protocol):
    """A Flax Linen module that completes and scores token sequences.

    `apply` is Linen's; the other methods run inside it, with variables
    `{"params": params}` or, with adapters, `{"params": base, "lora": adapters}`, both
    plain nested dicts. The module is a static argument of compiled functions, so its
    fields must be hashable. Prompts are right-padded, with any ids in the padding; a
    completion follows the last real token of its prompt. Hidden states times `head()`
    are logits.
    """

    @property
    def config(self) -> LanguageModelConfig:
        """Facts about the model."""
        ...

    def apply(
        self, variables: Any, *args: Any, method: Any = None, mutable: Any = False
    ) -> Any:
        """Returns what a method of the module computes with these variables."""
        ...

    def prefill(
        self, prompts: Int[Array, "N P"], lengths: Int[Array, " N"]
    ) -> tuple[Float[Array, "N D"], Any]:
        """Returns hidden states that predict each first own token, and a prefix.

        The prefix is any pytree; `decode` gets it unchanged.
        """
        ...

    def decode(
        self, tokens: Int[Array, "N G"], step: Any, prefix: Any, cache: Any
    ) -> tuple[Float[Array, "N G D"], Any]:
        """Returns hidden states that predict own token `step + 1`, and the new cache.

        `tokens` are the completions' own tokens `step`, traced and counted from 0; the
        cache is what this method returned for the step before, or that of `init_cache`.
        Its shapes and dtypes must stay.
        """
        ...

    def score(
        self,
        prompts: Int[Array, "N P"],
        lengths: Int[Array, " N"],
        completions: Int[Array, "N G T"],
    ) -> Float[Array, "N G T D"]:
        """Returns hidden states of which entry t predicts `completions[..., t]`.

        Differentiable in the parameters. They must be those of `prefill` and `decode`
        up to rounding, or the policy that is trained is not the one that is sampled.
        """
        ...

    def head(self) -> Float[Array, "D V"]:
        """Returns the matrix that turns hidden states to logits, in compute dtype."""
        ...

    def init_cache(
        self, num_prompts: int, group_size: int, max_new_tokens: int
    ) -> PyTree:
        """Returns the cache before the first own token; called without variables."""
        ...


@runtime_checkable
class RowScorer(LanguageModel, Protocol):
    """An optional method of a model whose completions can stand behind each other.

    With it the learner scores several completions of a prompt in one row. Without it
    each has a row of its own, by `score`.
    """

    def score_rows(
        self,
        prompts: Int[Array, "N P"],
        lengths: Int[Array, " N"],
        own: Int[Array, "A R S"],
        index: Int[Array, "A R S"],
        owner: Int[Array, "A R"],
    ) -> tuple[Float[Array, "N D"], Float[Array, "A R S D"]]:
        """Returns hidden states behind each prompt and behind each own token.

        The prompts come in A equal parts. `owner` says which prompt of its part a row
        belongs to, and `index` which token of its completion stands at a place. A token
        sees the row's prompt and the `index` tokens before it. Hidden states are those
        of `score`, up to rounding.
        """
        ...


@runtime_checkable
class SlotDecoder(LanguageModel, Protocol):
    """Optional methods of a model whose sequences decode at places of their own.

    With them the sampler refills slots as completions end. Without them it decodes with
    what `prefill` and `init_cache` give, all completions until the last one ends.
    `Decoder` has them all; its cache and blocks are those of `models.cache`.
    """

    def decode_slots(
        self, tokens: Int[Array, "A S"], slots: Any, blocks: Any, cache: Any
    ) -> tuple[Float[Array, "A S D"], Any]:
        """Returns hidden states that predict each slot's next token, and the new cache.

        `slots` says where the sequence of each slot stands, `blocks` hold keys and
        values of prompts and of earlier tokens.
        """
        ...

    def extend(
        self,
        tokens: Int[Array, "A S t"],
        counts: Int[Array, "A S"],
        slots: Any,
        blocks: Any,
        cache: Any,
    ) -> tuple[Float[Array, "A S t D"], Any]:
        """Returns hidden states behind many tokens of each slot, and the new cache.

        The first `counts` tokens of a slot are real. Slots, and hidden states up to
        rounding, must be as after `decode_slots` of one token after the other. `blocks`
        have a row for each slot.
        """
        ...

    def unroll(self, variables: PyTree) -> PyTree:
        """Returns variables in the form in which `decode_slots` is fastest.

        Called outside of `apply`.
        """
        ...


def in_compute_dtype(variables: PyTree, dtype: str) -> PyTree:
    """The variables as the model rounds them where it uses them.

    Norms and routers work in float32, so what is theirs stays as it is. So do the codes
    of quantized kernels, and their scales.
    """

    def cast(path: tuple, leaf: Array) -> Array:
        kept = path[-1].key in FLOAT32_PARAMS or path[-1].key == "codes"
        return leaf if kept else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, variables)
