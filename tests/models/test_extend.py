"""Many tokens at once leave a slot as one after the other does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.cache import Slots, prompt_block

COLUMNS = 12
OWN = 11
# Of the two slots of each prompt: how many tokens they feed one by one, then at once.
BEFORE = np.array([[0, 5], [3, 4], [6, 1]])
COUNTS = np.array([[4, 2], [3, 0], [1, 4]])


# Of six earlier tokens none, or some, are on the other side of the ring's end.
@pytest.mark.parametrize(
    ("apart", "column"), [(False, 11), (True, 2)], ids=["stacked", "apart"]
)
def test_extend_equals_score_and_so_does_what_follows(
    any_tiny, apart, column, in_layers
):
    model, variables, lengths = any_tiny.model, any_tiny.variables, any_tiny.lengths
    own = jax.random.randint(jax.random.key(3), (3, 2, OWN), 0, 64)
    run = lambda *args, method: model.apply(variables, *args, method=method)  # noqa: E731
    expected = jax.jit(
        lambda: run(any_tiny.prompts, lengths, own, method=model.score)
    )()
    prefill = lambda: run(any_tiny.prompts, lengths, method=model.prefill)  # noqa: E731
    _, prefix = jax.jit(prefill)()
    prompts, cache = prompt_block(prefix), model.init_cache(3, 2, COLUMNS)
    if apart:
        variables = model.unroll(variables)
        prompts, cache = in_layers((prompts, cache))
    # What earlier sequences left in the ring.
    cache = jax.tree.map(lambda x: x + 7.0, cache)
    each = jnp.broadcast_to(lengths[:, None], (3, 2))
    of_slots = lambda x, axis: jnp.repeat(x, 2, axis=axis)  # noqa: E731
    twice = jax.tree.map(lambda x: of_slots(x, x.ndim - 4), prompts)
    decode = jax.jit(lambda *args: run(*args, method=model.decode_slots))

    def one_by_one(cache, index, column):
        tokens = jnp.take_along_axis(own, jnp.maximum(index, 0)[..., None], axis=-1)
        hidden, cache = decode(
            tokens[..., 0], Slots(each, index, column), prompts, cache
        )
        return hidden, cache

    # All slots stand before their part of `COUNTS` when `column` is written next.
    for turn in range(int(BEFORE.max())):
        index = jnp.asarray(turn - BEFORE.max() + BEFORE)
        _, cache = one_by_one(cache, index, (column - BEFORE.max() + turn) % COLUMNS)
    at = BEFORE[..., None] + np.arange(4)
    tokens = jnp.take_along_axis(own, jnp.asarray(np.minimum(at, OWN - 1)), axis=-1)
    before, counts = jnp.asarray(BEFORE), jnp.asarray(COUNTS)
    hidden, cache = jax.jit(lambda *args: run(*args, method=model.extend))(
        tokens, counts, Slots(each, before, jnp.int32(column)), twice, cache
    )
    for n, g in np.ndindex(3, 2):
        first, count = BEFORE[n, g], COUNTS[n, g]
        # Entry t of a score predicts token t.
        np.testing.assert_allclose(
            hidden[n, g, :count],
            expected[n, g, first + 1 : first + 1 + count],
            atol=3e-5,
        )
    for turn in range(3):
        index = before + counts + turn
        hidden, cache = one_by_one(cache, index, (column + turn) % COLUMNS)
        for n, g in np.ndindex(3, 2):
            np.testing.assert_allclose(
                hidden[n, g], expected[n, g, index[n, g] + 1], atol=3e-5
            )
