"""The learning rate by hand, and what the optimizer does to each kind of parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.config import OptimizerConfig
from grpo_jax.training.optimizer import make_optimizer, make_schedule


def rates(total, count=None, **options):
    schedule = make_schedule(OptimizerConfig(**options), total_updates=total)
    return [float(schedule(i)) for i in range(total if count is None else count)]


@pytest.mark.parametrize(
    ("options", "total", "expected"),
    [
        ({}, 3, [8, 8, 8]),
        # The first update has a quarter of the rate, the fourth all of it.
        ({"warmup_steps": 4}, 6, [2, 4, 6, 8, 8, 8]),
        ({"warmup_steps": 1}, 3, [8, 8, 8]),
        ({"schedule": "linear"}, 4, [8, 6, 4, 2]),
        ({"schedule": "linear", "warmup_steps": 2}, 6, [4, 8, 8, 6, 4, 2]),
        # (1 + cos(pi k / 4)) / 2 is 1, 0.853553, 0.5, 0.146447.
        ({"schedule": "cosine"}, 4, [8, 6.828427, 4, 1.171573]),
        ({"schedule": "cosine", "warmup_steps": 2}, 4, [4, 8, 8, 4]),
        # A warm-up that takes the whole run never comes to the fall.
        ({"schedule": "linear", "warmup_steps": 4}, 2, [2, 4]),
    ],
)
def test_the_learning_rate_follows_its_schedule(options, total, expected):
    given = rates(total, learning_rate=8.0, **options)
    np.testing.assert_allclose(given, expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_falling_rate_reaches_zero_after_the_last_update(schedule):
    given = rates(10, 12, learning_rate=1.0, schedule=schedule, warmup_steps=3)
    assert given[9] > 0.0
    np.testing.assert_allclose(given[10:], 0.0, atol=1e-7)


def small_params():
    return {
        "embed": {"embedding": jnp.ones((2, 3))},
        "layers": {
            "norm": {"scale": jnp.ones((2, 3))},
            "q": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))},
        },
        "lora": {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))},
    }


def first_updates(config, grads):
    tx = make_optimizer(config, total_updates=10)
    return tx.update(grads, tx.init(small_params()), small_params())[0]


def test_weights_decay_but_norms_and_biases_do_not():
    config = OptimizerConfig(learning_rate=0.5, weight_decay=0.1)
    zeros = jax.tree.map(jnp.zeros_like, small_params())
    updates = first_updates(config, zeros)
    # Without a gradient only the decay is left: -0.5 * 0.1 * 1.
    for leaf in (
        updates["embed"]["embedding"],
        updates["layers"]["q"]["kernel"],
        *updates["lora"].values(),
    ):
        np.testing.assert_allclose(leaf, -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["layers"]["norm"]["scale"], 0.0)
    np.testing.assert_array_equal(updates["layers"]["q"]["bias"], 0.0)


def test_the_first_update_of_adam_is_the_rate_in_the_direction_of_the_gradient():
    grads = jax.tree.map(lambda leaf: -3e3 * jnp.ones_like(leaf), small_params())
    updates = first_updates(OptimizerConfig(learning_rate=0.5), grads)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, 0.5, rtol=1e-4)


@pytest.mark.parametrize("limit", [None, 0.1, 1e9])
def test_gradients_are_clipped_by_their_global_norm_before_adam(limit):
    # Adam alone forgets a gradient's size; its first moment remembers it.
    config = OptimizerConfig(max_grad_norm=limit, b1=0.9)
    grads = jax.tree.map(lambda leaf: 2.0 * jnp.ones_like(leaf), small_params())
    tx = make_optimizer(config, total_updates=10)
    _, state = tx.update(grads, tx.init(small_params()), small_params())
    norm = float(optax.tree.norm(grads))
    scale = min(1.0, (limit or np.inf) / norm)
    moments = [s.mu for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s)]
    np.testing.assert_allclose(
        optax.tree.norm(moments[0]), 0.1 * norm * scale, rtol=1e-5
    )


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)
