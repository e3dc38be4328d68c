"""Decoder: one Flax Linen language model for every family, with the group as a shape.

Every mode (a plain pass, prefill, decode, score) is the same stack of layers with
another way to attend. Layers are stacked on a leading axis and scanned, so compile time
does not grow with depth. Hidden states are returned after the final norm.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, PyTree

from grpo_jax.models import _hybrid as hybrid
from grpo_jax.models import _rows
from grpo_jax.models._attention import slot_attention
from grpo_jax.models._block import Layer, per_layer_data, rotary_tables
from grpo_jax.models._extend import extend_attention
from grpo_jax.models._layers import Embedding, Projection, RMSNorm, unrolled
from grpo_jax.models._row_attention import attend_causal, attend_row
from grpo_jax.models.cache import (
    Cache,
    Prefix,
    PromptBlock,
    Slots,
    per_layer,
    prompt_block,
    read_layer,
    write_token,
)
from grpo_jax.models.config import ModelConfig


class Decoder(nn.Module):
    """A decoder-only language model.

    `model.apply({"params": params}, *arrays, method=model.score)`; with adapters the
    variables are `{"params": base, "lora": adapters}`.
    """

    config: ModelConfig

    def setup(self):
        """Declares the embedding, the layer to be scanned, the norm and the head."""
        config = self.config
        self.embed = Embedding(
            vocab_size=config.vocab_size,
            features=config.hidden_size,
            scale=config.embedding_scale,
            dtype=config.dtype,
        )
        self.layers = Layer(config)
        self.final_norm = RMSNorm(
            eps=config.norm_eps, offset=config.norm_offset, divisor=config.logit_divisor
        )
        if not config.tie_embeddings:
            self.lm_head = Projection(
                in_features=config.hidden_size,
                out_features=config.vocab_size,
                axes=("embed", "vocab"),
                use_bias=False,
                lora_scale=None,
            )

    def forward(
        self, tokens: Int[Array, "B S"], lengths: Int[Array, " B"]
    ) -> Float[Array, "B S D"]:
        """Returns hidden states of a plain causal pass; entry s predicts token s + 1.

        Rows are right-padded to S. No real token sees padding, which lies in its
        future. So `lengths` changes nothing; states at and beyond it mean nothing.
        """
        del lengths
        x, _ = self._prompt_pass(tokens, None, keep=False)
        return self.final_norm(x)

    def prefill(
        self, prompts: Int[Array, "N P"], lengths: Int[Array, " N"]
    ) -> tuple[Float[Array, "N D"], Prefix]:
        """Returns the hidden state at each prompt's last token, and the prefix.

        The hidden state predicts the first token of a completion.
        """
        x, (keys, values, *state) = self._prompt_pass(prompts, lengths, keep=True)
        last = self.final_norm(_rows.at_last(x, lengths))
        return last, Prefix(keys, values, lengths, *state)

    def decode(
        self,
        tokens: Int[Array, "N G"],
        step: Int[Array, ""] | int,
        prefix: Prefix,
        cache: Cache,
    ) -> tuple[Float[Array, "N G D"], Cache]:
        """Returns hidden states that predict own token `step + 1`, and the new cache.

        `tokens` are the completions' own tokens `step`, at position length + step.
        """
        zero = jnp.zeros_like(tokens)
        slots = Slots(prefix.lengths[:, None] + zero, index=zero + step, column=step)
        return self.decode_slots(tokens, slots, prompt_block(prefix), cache)

    def decode_slots(
        self,
        tokens: Int[Array, "A S"],
        slots: Slots,
        prompts: PromptBlock,
        cache: Cache,
    ) -> tuple[Float[Array, "A S D"], Cache]:
        """Returns hidden states that predict each slot's next token, and the new cache.

        The sequences of the slots may stand anywhere. The cache is carried through the
        layers and written in place at `slots.column`.
        """
        tables = rotary_tables(self.config, slots.positions)

        def body(layer, carry, inputs):
            x, cache = carry
            data, entry = inputs

            def attend(q, k, v):
                keys, values = entry
                # The cache travels in the carry, where XLA can write in place. Scanned
                # over and returned, it would be written whole at every token.
                one = (tokens.size, k.shape[2], 1, k.shape[3])
                new = k.reshape(one), v.reshape(one)
                written = write_token(
                    cache, *new, layer=data.index, column=slots.column
                )
                out = slot_attention(
                    q,
                    *read_layer(written, data.index),
                    slots=slots,
                    prompts=dataclasses.replace(prompts, keys=keys, values=values),
                    window=data.window,
                    scale=self.config.attention_scale,
                    softcap=self.config.attention_softcap,
                )
                return out, written

            def remember(inputs):
                own = dataclasses.replace(prompts, state=entry[0])
                return of_slots(inputs, prompts=own, cache=cache, index=data.index)

            return layer(x, tables, data, attend, remember), None

        of_slots = functools.partial(hybrid.of_slots, config=self.config, slots=slots)
        carry = (self.embed(tokens, whole_table=True), cache)
        entries = prompts.keys, prompts.values
        (x, cache), _ = self._run(body, carry, entries, prompts.state)
        return self.final_norm(x), cache

    def extend(
        self,
        tokens: Int[Array, "A S t"],
        counts: Int[Array, "A S"],
        slots: Slots,
        prompts: PromptBlock,
        cache: Cache,
    ) -> tuple[Float[Array, "A S t D"], Cache]:
        """Returns hidden states behind the tokens of each slot, and the new cache.

        As `decode_slots` of the first `counts` tokens, one after the other, but the
        newest is afterwards in the column before `slots.column`. `slots` is where each
        stands when its first token is fed, `prompts` have a row for each.
        """
        a, s, t = tokens.shape
        positions = slots.positions[..., None] + jnp.arange(t)[None, None]
        tables = rotary_tables(self.config, positions.reshape(a, s * t))
        over = functools.partial(
            extend_attention, slots=slots, counts=counts, config=self.config
        )

        def body(layer, x, inputs):
            data, entry = inputs
            attend = functools.partial(over, entry, window=data.window)
            remember = functools.partial(of_extended, states=entry)
            return layer(x, tables, data, attend, remember)

        of_extended = functools.partial(
            hybrid.of_extended, config=self.config, slots=slots, counts=counts
        )
        entries = (prompts.keys, prompts.values, cache.keys, cache.values)
        x = self.embed(tokens.reshape(a, s * t))
        x, written = self._run(body, x, entries, prompts.state, cache.state)
        return self.final_norm(x).reshape(a, s, t, -1), cache.of_layers(*written)

    def unroll(self, variables: PyTree) -> PyTree:
        """Returns variables with separate arrays for each layer, to decode faster.

        `decode_slots` accepts them like the stacked ones, and computes the same.
        Kernels become [out, in]: a product with few rows reads such a kernel without a
        copy. Called outside of `apply`.
        """
        split = functools.partial(per_layer, count=self.config.num_layers)
        if self.config.mixer is not None:
            kinds = self.config.mixer.layers
            split = functools.partial(hybrid.split_layers, kinds=kinds)
        return unrolled(variables, split)

    def score(
        self,
        prompts: Int[Array, "N P"],
        lengths: Int[Array, " N"],
        completions: Int[Array, "N G T"],
    ) -> Float[Array, "N G T D"]:
        """Returns hidden states of which entry t predicts `completions[..., t]`."""
        own = completions[..., :-1]  # the last token is predicted, never read
        # The last real token of a prompt predicts the first token of its completions.
        first, hidden = self.score_rows(prompts, lengths, own)
        first = first[:, None, None, :]
        first = jnp.broadcast_to(first, (*own.shape[:2], 1, first.shape[-1]))
        return jnp.concatenate([first, hidden], axis=2)

    def score_rows(
        self,
        prompts: Int[Array, "N P"],
        lengths: Int[Array, " N"],
        own: Int[Array, "A R S"],
        index: Int[Array, "A R S"] | None = None,
        owner: Int[Array, "A R"] | None = None,
    ) -> tuple[Float[Array, "N D"], Float[Array, "A R S D"]]:
        """Returns hidden states behind each prompt, and behind each own token.

        Without `index` and `owner` row g of `own` is a completion of prompt n, A is N.
        With them see `RowScorer`.

        The prompts of a part and its own tokens form one row, so that every projection
        is one product and a prompt is computed, stored and differentiated once. Only
        attention takes the row apart.
        """
        before = lengths[:, None, None]
        if index is None or owner is None:
            index = jnp.arange(own.shape[2])[None, None]
        else:
            before = _rows.of_owners(lengths, owner).reshape(*owner.shape, 1)
        # Own tokens follow the last real token of their prompt, and not its padding.
        own_positions = jnp.broadcast_to(before + index, own.shape)
        of_part = lambda x: x.reshape(len(own), -1)  # noqa: E731
        positions = _rows.join(of_part(_rows.prompt_positions(prompts)), own_positions)
        tables = rotary_tables(self.config, positions)

        def body(layer, x, inputs):
            data, _ = inputs

            def attend(q, k, v):
                parts = [_rows.part(x, own.shape) for x in (q, k, v)]
                return over(parts, lengths, index, owner, window=data.window), None

            return layer(x, tables, data, attend, of_row)

        over = functools.partial(attend_row, config=self.config)
        rows: Any = {"lengths": lengths, "index": index, "owner": owner}
        of_row = functools.partial(
            hybrid.of_row, config=self.config, own_shape=own.shape, **rows
        )
        x, _ = self._run(body, self.embed(_rows.join(of_part(prompts), own)))
        prompt, hidden = _rows.part(x, own.shape)
        last = _rows.at_last(prompt.reshape(*prompts.shape, -1), lengths)
        return self.final_norm(last), self.final_norm(hidden)

    def head(self) -> Float[Array, "D V"]:
        """Returns the matrix that turns hidden states to logits, in compute dtype.

        Whoever applies it applies `config.logit_softcap` to the product as well.
        """
        if self.config.tie_embeddings:
            return self.embed.embedding.T.astype(self.config.dtype)
        return self.lm_head.matrix().astype(self.config.dtype)

    def init_cache(
        self, num_prompts: int, group_size: int, max_new_tokens: int
    ) -> Cache:
        """Returns an empty cache for `max_new_tokens` own tokens of each sequence."""
        config, rows = self.config, num_prompts * group_size
        shape = (config.attention_layers, rows, config.num_kv_heads)
        width, columns, dtype = config.head_dim, max_new_tokens, config.dtype
        return Cache(
            keys=jnp.zeros((*shape, width, columns), dtype),
            values=jnp.zeros((*shape, columns, width), dtype),
            state=hybrid.empty_states(config, rows),
        )

    def _prompt_pass(
        self, tokens: Int[Array, "N S"], lengths: Int[Array, " N"] | None, *, keep: bool
    ) -> tuple[Float[Array, "N S D"], Any]:
        """Returns hidden states before the final norm, and what is kept of them."""
        tables = rotary_tables(self.config, _rows.prompt_positions(tokens))

        def body(layer, x, inputs):
            data, _ = inputs

            def attend(q, k, v):
                k, v = _rows.of_prompts(k), _rows.of_prompts(v)
                out = attend_causal(q, k, v, config=self.config, window=data.window)
                return out, (k, v) if keep else None

            return layer(x, tables, data, attend, remember)

        remember = functools.partial(
            hybrid.of_prompts, config=self.config, lengths=lengths, keep=keep
        )
        return self._run(body, self.embed(tokens))

    def _run(
        self, body: Callable, carry: PyTree, entries: PyTree = (), *states: PyTree
    ) -> Any:
        """Returns the carry of `body` over all layers, and what it returns of each.

        `states` are for the layers without attention, `entries` for the others.
        """
        if self.config.mixer is None:
            apart = any(isinstance(arrays, tuple) for arrays in entries)
            return (self._run_unrolled if apart else self._scan)(body, carry, entries)
        if self.is_initializing():  # see `hybrid.init_layers`
            return carry, ()
        given = self.variables, body, carry, entries, states
        return hybrid.run(self.config, *given)

    def _run_unrolled(self, body: Callable, carry: PyTree, entries: PyTree) -> Any:
        """Returns what `_scan` does, with parameters and entries from `unroll`."""
        # A scan slices each layer's arrays out of the stack, which is a copy at every
        # token. Here each layer's arrays are inputs of their own.
        plain, results = Layer(self.config, parent=None), []
        count = self.config.num_layers
        for i, data in enumerate(per_layer(per_layer_data(self.config), count)):
            own = {name: trees["layers"][i] for name, trees in self.variables.items()}
            layer = functools.partial(plain.apply, own)
            entry = tuple(arrays[i] for arrays in entries)
            carry, result = body(layer, carry, (data.replace(index=i), entry))
            results.append(result)
        return carry, jax.tree.map(lambda *of_layers: of_layers, *results)

    def _scan(self, body: Callable, carry: PyTree, stacked: PyTree) -> Any:
        """Returns what a scan of `body(layer, carry, (data, entry))` over layers does.

        `data` is a layer's `PerLayer`, `entry` its entry of the stacked arrays.
        """
        policy = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
        if self.config.remat != "none":
            # Inside a scan nothing can be merged across the boundary anyway.
            body = nn.remat(
                body, policy=policy.get(self.config.remat), prevent_cse=False
            )
        scan = nn.scan(
            body,
            variable_axes={"params": 0, "lora": 0, "routers": 0},
            split_rngs={"params": True},
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(self.layers, carry, (per_layer_data(self.config), stacked))


def init_params(model: Decoder, key: Key[Array, ""]) -> PyTree:
    """Returns freshly drawn float32 parameters, a plain nested dict.

    Kernels and embeddings are normal with standard deviation 0.02, norms multiply by 1,
    biases are 0. Traceable, so that parameters can be born sharded under `jax.jit`.
    """
    return nn.meta.unbox(_boxed_params(model, key))


def abstract_params(model: Decoder) -> PyTree:
    """Returns the tree of `init_params` with shapes and dtypes in place of arrays."""
    return _shapes_and_axes(model.config)[0]


def param_axes(model: Decoder) -> PyTree:
    """Returns the tree of `init_params` with a tuple of logical axis names per leaf."""
    return _shapes_and_axes(model.config)[1]


# Kept: every run asks several times, and tracing takes as long as loading the model.
@functools.lru_cache(maxsize=8)
def _shapes_and_axes(config: ModelConfig) -> tuple[PyTree, PyTree]:
    boxed = jax.eval_shape(lambda: _boxed_params(Decoder(config), jax.random.key(0)))
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    shape = lambda box: jax.ShapeDtypeStruct(box.value.shape, box.value.dtype)  # noqa: E731
    shapes = jax.tree.map(shape, boxed, is_leaf=is_box)
    return shapes, jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)


def _boxed_params(model: Decoder, key: Key[Array, ""]) -> PyTree:
    touch = lambda bound, *given: (bound.forward(*given), bound.head())  # noqa: E731
    tokens, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    params = model.init(key, tokens, lengths, method=touch)["params"]
    if model.config.mixer is None:
        return params
    return {**params, "layers": hybrid.init_layers(model.config, key)}
