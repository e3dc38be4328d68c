"""What must not change the loss: padding, order, cuts, a shift of the rewards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.objective import (
    centered_advantages,
    group_softmax_weights,
    grpo_loss,
    leave_one_out_advantages,
    softmax_advantages,
    standardized_advantages,
)

N, G, T, PADDED = 2, 3, 4, 7
PER_TOKEN = ("logp", "old_logp", "ref_logp", "entropy")
FORMS = {
    "grpo": {},
    "gspo": {"ratio_level": "sequence", "clip_low": 0.05, "clip_high": 0.1},
    "dapo": {"aggregation": "token_mean", "clip_high": 0.28, "dual_clip": 3.0},
    "dr_grpo": {"aggregation": "fixed_length", "max_length": 10},
    "cispo": {
        "surrogate": "cispo",
        "cispo_max_weight": 1.5,
        "aggregation": "token_mean",
    },
    "likelihood": {"surrogate": "likelihood", "aggregation": "sequence_sum"},
}
ADVANTAGES = {
    "weights": group_softmax_weights,
    "softmax": softmax_advantages,
    "standardized": standardized_advantages,
    "centered": centered_advantages,
    "leave_one_out": leave_one_out_advantages,
}
every_form = pytest.mark.parametrize("form", FORMS)
every_advantage = pytest.mark.parametrize("name", ADVANTAGES)
# Shapes are fixed and values vary, so that nothing is compiled again.
examples = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def random_arrays(seed):
    generator = np.random.default_rng(seed)
    logp = -generator.exponential(1.0, (N, G, T))
    lengths = generator.integers(0, T + 1, (N, G, 1))
    noisy = {name: logp + generator.normal(0, 0.5, logp.shape) for name in PER_TOKEN}
    arrays = noisy | {"advantages": generator.normal(size=(N, G))}
    return {name: x.astype(np.float32) for name, x in arrays.items()} | {
        "mask": np.arange(T) < lengths
    }


@functools.cache
def totals(form):
    """Compiled: (loss mean, metric means, gradient of the loss's total by logp)."""

    def loss(logp, arrays):
        out = grpo_loss(
            logp,
            arrays["mask"],
            arrays["advantages"],
            old_logp=arrays["old_logp"],
            ref_logp=arrays["ref_logp"],
            entropy=arrays["entropy"],
            kl_coef=0.04,
            entropy_coef=0.01,
            # Of the longest form, so that padding does not move it.
            **({"max_length": 10} | FORMS[form]),
        )
        return out.loss.total, out

    return jax.jit(
        lambda arrays: jax.value_and_grad(loss, has_aux=True)(arrays["logp"], arrays)
    )


def run(form, arrays):
    (_, out), grad = totals(form)(jax.tree.map(jnp.asarray, arrays))
    return jax.tree.map(np.asarray, out), np.asarray(grad)


def assert_close(one, other):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other
    )


@every_form
@given(seed=seeds, junk=st.sampled_from([np.nan, np.inf, -np.inf, 1e30, 0.0]))
@examples
def test_padding_changes_nothing(form, seed, junk):
    arrays = random_arrays(seed)
    padded = dict(arrays)
    for name in PER_TOKEN:
        padded[name] = np.full((N, G, PADDED), junk, np.float32)
        padded[name][..., :T] = np.where(arrays["mask"], arrays[name], junk)
    padded["mask"] = np.zeros((N, G, PADDED), bool)
    padded["mask"][..., :T] = arrays["mask"]
    out, grad = run(form, arrays)
    padded_out, padded_grad = run(form, padded)
    assert_close(padded_out, out)
    np.testing.assert_allclose(padded_grad[..., :T], grad, rtol=1e-6)
    assert not padded_grad[..., T:].any()


@every_form
@given(seed=seeds, order=st.permutations(range(G)))
@examples
def test_the_order_inside_a_group_changes_nothing(form, seed, order):
    arrays = random_arrays(seed)
    out, grad = run(form, arrays)
    permuted = {name: x[:, list(order)] for name, x in arrays.items()}
    permuted_out, permuted_grad = run(form, permuted)
    assert_close(permuted_out, out)
    np.testing.assert_allclose(permuted_grad, grad[:, list(order)], rtol=1e-6)


@every_form
@given(seed=seeds)
@examples
def test_microbatches_add_up_to_the_whole(form, seed):
    arrays = random_arrays(seed)
    out, grad = run(form, arrays)
    parts = [
        run(form, {name: x[:, g : g + 1] for name, x in arrays.items()})
        for g in range(G)
    ]
    added = functools.reduce(
        lambda a, b: jax.tree.map(np.add, a, b), [part for part, _ in parts]
    )
    assert_close(added, out)
    part_grads = np.concatenate([part_grad for _, part_grad in parts], axis=1)
    np.testing.assert_allclose(part_grads, grad, rtol=1e-6)


@functools.cache
def compiled(name):
    return jax.jit(ADVANTAGES[name])


def random_rewards(seed):
    return np.random.default_rng(seed).normal(size=(N, G)).astype(np.float32)


@every_advantage
@given(seed=seeds, shift=st.floats(-10, 10))
@examples
def test_a_shift_of_all_rewards_changes_no_advantage(name, seed, shift):
    rewards = random_rewards(seed)
    np.testing.assert_allclose(
        compiled(name)(rewards + np.float32(shift)),
        compiled(name)(rewards),
        rtol=1e-4,
        atol=1e-5,
    )


@every_advantage
@given(seed=seeds, order=st.permutations(range(G)))
@examples
def test_advantages_follow_their_completions(name, seed, order):
    rewards = random_rewards(seed)
    np.testing.assert_allclose(
        compiled(name)(rewards[:, list(order)]),
        np.asarray(compiled(name)(rewards))[:, list(order)],
        rtol=1e-5,
        atol=1e-6,
    )


@every_advantage
@given(seed=seeds)
@examples
def test_a_group_sums_to_zero_or_to_one_for_weights(name, seed):
    sums = np.asarray(compiled(name)(random_rewards(seed))).sum(axis=-1)
    np.testing.assert_allclose(sums, float(name == "weights"), atol=1e-5)
