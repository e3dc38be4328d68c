"""Decoder: one Flax Linen language model for every family, with the group as a shape.

Every mode (a plain pass, prefill, decode, score) is the same stack of layers with
another way to attend. Layers are stacked on a leading axis and scanned, so compile time
does not grow with depth. Hidden states are returned after the final norm.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, PyTree

from grpo_jax.models._attention import attention, head_major
from grpo_jax.models._block import Layer, PerLayer, per_layer_data, rotary_tables
from grpo_jax.models._layers import Embedding, Projection, RMSNorm, transpose_kernels
from grpo_jax.models.cache import (
    Cache,
    Prefix,
    per_layer,
    read_layer,
    regroup,
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
        self.final_norm = RMSNorm(eps=config.norm_eps, offset=config.norm_offset)
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
        future, so `lengths` changes nothing; it is here because hidden states at and
        beyond it mean nothing.
        """
        del lengths
        x, _ = self._prompt_pass(tokens, keep=False)
        return self.final_norm(x)

    def prefill(
        self, prompts: Int[Array, "N P"], lengths: Int[Array, " N"]
    ) -> tuple[Float[Array, "N D"], Prefix]:
        """Returns the hidden state at each prompt's last token, and the prefix.

        The hidden state predicts the first token of a completion.
        """
        x, (keys, values) = self._prompt_pass(prompts, keep=True)
        last = self.final_norm(_at_last(x, lengths))
        return last, Prefix(keys=keys, values=values, lengths=lengths)

    def decode(
        self,
        tokens: Int[Array, "N G"],
        step: Int[Array, ""] | int,
        prefix: Prefix,
        cache: Cache,
    ) -> tuple[Float[Array, "N G D"], Cache]:
        """Returns hidden states that predict own token `step + 1`, and the new cache.

        `tokens` are the completions' own tokens `step`, at position length + step. The
        cache is carried through the layers and written in place at `step`.
        """
        positions = jnp.broadcast_to(prefix.lengths[:, None] + step, tokens.shape)
        tables = rotary_tables(self.config, positions)

        def body(layer, carry, inputs):
            x, cache = carry
            data, (keys, values) = inputs
            shared = Prefix(keys=keys, values=values, lengths=prefix.lengths)

            def attend(q, k, v):
                q, *new = (part[:, :, None] for part in (q, k, v))
                k, v = (head_major(part) for part in new)
                # The cache travels in the carry, where XLA can write in place. Scanned
                # over and returned, it would be written whole at every token.
                written = write_token(cache, k, v, layer=data.index, step=step)
                k, v = read_layer(written, data.index)
                out = self._attention(q, k, v, data=data, prefix=shared, offset=step)
                return out[:, :, 0], written

            return layer(x, tables, data, attend), None

        embedded = self.embed(tokens, whole_table=True)
        carry, prompts = (embedded, cache), (prefix.keys, prefix.values)
        run = self._run_unrolled if isinstance(prefix.keys, tuple) else self._scan
        (x, cache), _ = run(body, carry, prompts)
        return self.final_norm(x), cache

    def unroll(
        self, variables: PyTree, prefix: Prefix, cache: Cache
    ) -> tuple[PyTree, Prefix, Cache]:
        """Returns the three with separate arrays for each layer, to decode faster.

        `decode` accepts them like the stacked ones, and computes the same. Kernels
        become [out, in]: a product with few rows reads such a kernel without a copy.
        Called outside of `apply`.
        """
        count = self.config.num_layers
        variables = {
            collection: {
                name: dict(enumerate(per_layer(transpose_kernels(tree), count)))
                if name == "layers"
                else tree
                for name, tree in trees.items()
            }
            for collection, trees in variables.items()
        }
        keys, values = (per_layer(x, count) for x in (prefix.keys, prefix.values))
        own = Cache(*(per_layer(x, count) for x in (cache.keys, cache.values)))
        return variables, Prefix(keys, values, prefix.lengths), own

    def regroup(
        self,
        prefix: Prefix,
        cache: Cache,
        prompts: Int[Array, "S M"],
        slots: Int[Array, "S M W"],
    ) -> tuple[Prefix, Cache]:
        """Returns the prefix and cache of other groups: `cache.regroup`."""
        return regroup(prefix, cache, prompts, slots)

    def score(
        self,
        prompts: Int[Array, "N P"],
        lengths: Int[Array, " N"],
        completions: Int[Array, "N G T"],
    ) -> Float[Array, "N G T D"]:
        """Returns hidden states of which entry t predicts `completions[..., t]`.

        A prompt and the own tokens of its G completions form one row, so that every
        projection is one product and the prompt is computed, stored and differentiated
        once. Only attention takes the row apart.
        """
        own = completions[..., :-1]  # the last token is predicted, never read
        own_positions = lengths[:, None, None] + jnp.arange(own.shape[2])[None, None]
        own_positions = jnp.broadcast_to(own_positions, own.shape)
        # Rotary angles depend on the true position. Own tokens follow the last real
        # token of their prompt, and not its padding.
        positions = _join(_prompt_positions(prompts), own_positions)
        tables = rotary_tables(self.config, positions)

        def body(layer, x, inputs):
            data, _ = inputs

            def attend(q, k, v):
                parts = [_part(x, own.shape) for x in (q, k, v)]
                return self._attend_row(parts, lengths, data=data), None

            return layer(x, tables, data, attend)

        x, _ = self._scan(body, self.embed(_join(prompts, own)), None)
        prompt, own_x = _part(x, own.shape)
        # The last real token of a prompt predicts the first token of its completions.
        first = _at_last(prompt, lengths)[:, None, None, :]
        first = jnp.broadcast_to(first, (*own.shape[:2], 1, x.shape[-1]))
        return self.final_norm(jnp.concatenate([first, own_x], axis=2))

    def head(self) -> Float[Array, "D V"]:
        """Returns the matrix that turns hidden states to logits, in compute dtype.

        Whoever applies it applies `config.logit_softcap` to the product as well.
        """
        if self.config.tie_embeddings:
            return self.embed.embedding.T.astype(self.config.dtype)
        return self.lm_head.kernel.astype(self.config.dtype)

    def init_cache(
        self, num_prompts: int, group_size: int, max_new_tokens: int
    ) -> Cache:
        """Returns an empty cache for `max_new_tokens` own tokens of each sequence."""
        config = self.config
        shape = (config.num_layers, num_prompts, config.num_kv_heads, group_size)
        empty = jnp.zeros((*shape, max_new_tokens, config.head_dim), config.dtype)
        return Cache(keys=empty, values=jnp.zeros_like(empty))

    def _prompt_pass(
        self, tokens: Int[Array, "N S"], *, keep: bool
    ) -> tuple[Float[Array, "N S D"], Any]:
        """Returns hidden states before the final norm, and keys and values if kept."""
        tables = rotary_tables(self.config, _prompt_positions(tokens))

        def body(layer, x, inputs):
            data, _ = inputs

            def attend(q, k, v):
                k, v = _of_prompts(k), _of_prompts(v)
                out = self._causal(q, k, v, data=data)
                return out, (k, v) if keep else None

            return layer(x, tables, data, attend)

        return self._scan(body, self.embed(tokens), None)

    def _attend_row(
        self, parts: list[tuple[Array, Array]], lengths: Array, *, data: PerLayer
    ) -> Float[Array, "N S H h"]:
        """Returns attention of a row of `score` from its queries, keys and values.

        Each comes in two parts, the prompt's and that of the completions.
        """
        (prompt_q, own_q), (prompt_k, own_k), (prompt_v, own_v) = parts
        keys, values = _of_prompts(prompt_k), _of_prompts(prompt_v)
        # One causal pass over the whole row would let completions see each other. So
        # the prompt attends alone, and is then the shared prefix of its completions.
        out = self._causal(prompt_q, keys, values, data=data)
        if own_q.size == 0:  # completions of one token: it is predicted, never read
            return out
        prefix = Prefix(keys=keys, values=values, lengths=lengths)
        q, k, v = own_q, head_major(own_k), head_major(own_v)
        return _join(out, self._attention(q, k, v, data=data, prefix=prefix))

    def _causal(
        self,
        q: Float[Array, "N S H h"],
        k: Float[Array, "N K S h"],
        v: Float[Array, "N K S h"],
        *,
        data: PerLayer,
    ) -> Float[Array, "N S H h"]:
        """Returns attention within rows, which is that of groups of one."""
        k, v = k[:, :, None], v[:, :, None]
        return self._attention(q[:, None], k, v, data=data)[:, 0]

    def _attention(
        self,
        q: Float[Array, "N G T H h"],
        k: Float[Array, "N K G S h"],
        v: Float[Array, "N K G S h"],
        *,
        data: PerLayer,
        prefix: Prefix | None = None,
        offset: Int[Array, ""] | int = 0,
    ) -> Float[Array, "N G T H h"]:
        return attention(
            q,
            k,
            v,
            prefix=prefix,
            offset=offset,
            window=data.window,
            scale=self.config.attention_scale,
            softcap=self.config.attention_softcap,
        )

    def _run_unrolled(self, body: Callable, carry: PyTree, entries: PyTree) -> Any:
        """Returns what `_scan` does, with parameters and entries from `unroll`."""
        # A scan slices each layer's arrays out of the stack, which is a copy at every
        # token. Here each layer's arrays are inputs of their own.
        plain = Layer(self.config, parent=None)
        count = self.config.num_layers
        for i, data in enumerate(per_layer(per_layer_data(self.config), count)):
            own = {name: trees["layers"][i] for name, trees in self.variables.items()}
            layer = functools.partial(plain.apply, own)
            entry = tuple(arrays[i] for arrays in entries)
            carry, _ = body(layer, carry, (data.replace(index=i), entry))
        return carry, None

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
            variable_axes={"params": 0, "lora": 0},
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
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def param_axes(model: Decoder) -> PyTree:
    """Returns the tree of `init_params` with a tuple of logical axis names per leaf."""
    boxed = jax.eval_shape(lambda: _boxed_params(model, jax.random.key(0)))
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)


def _boxed_params(model: Decoder, key: Key[Array, ""]) -> PyTree:
    def touch(bound: Decoder, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        return bound.forward(tokens, lengths), bound.head()

    tokens, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    return model.init(key, tokens, lengths, method=touch)["params"]


def _prompt_positions(tokens: Int[Array, "N P"]) -> Int[Array, "N P"]:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)


def _at_last(x: Float[Array, "N P D"], lengths: Int[Array, " N"]) -> Array:
    """Returns the rows of x at each prompt's last real token, [N, D]."""
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]


def _join(prompt: Array, own: Array) -> Array:
    """Returns [N, P, ...] and [N, G, T, ...] as one row [N, P + G * T, ...]."""
    n, g, t, *rest = own.shape
    return jnp.concatenate([prompt, own.reshape(n, g * t, *rest)], axis=1)


def _of_prompts(x: Float[Array, "N P K h"]) -> Float[Array, "N K P h"]:
    """Returns keys or values of prompts in the layout of `Prefix`."""
    return x.transpose(0, 2, 1, 3)


def _part(row: Array, own_shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Returns the two arrays that `_join` made one of."""
    n, g, t = own_shape
    cut = row.shape[1] - g * t
    return row[:, :cut], row[:, cut:].reshape(n, g, t, *row.shape[2:])
