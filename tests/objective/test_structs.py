"""A mean is its two sums: in whatever parts it is made, it is the same mean."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.objective.structs import LossOutput, Mean, TokenLogprobs

# Sums of these are exact in float32, so that the order of adding cannot matter.
parts = st.lists(
    st.tuples(st.integers(-1000, 1000), st.integers(0, 1000)), min_size=1, max_size=6
)


def mean_of(total, weight):
    return Mean(jnp.float32(total), jnp.float32(weight))


@settings(max_examples=30)
@given(pairs=parts, order=st.randoms(use_true_random=False))
def test_a_mean_does_not_depend_on_how_its_parts_are_added(pairs, order):
    total, weight = np.sum(pairs, axis=0)
    shuffled = order.sample(pairs, len(pairs))
    whole = sum((mean_of(*pair) for pair in shuffled[1:]), mean_of(*shuffled[0]))
    assert (whole.total, whole.weight) == (total, weight)
    assert whole.value() == (np.float32(total / weight) if weight else 0.0)


def test_an_empty_part_changes_nothing_and_alone_is_zero_without_gradient():
    some, empty = mean_of(3.0, 4.0), mean_of(0.0, 0.0)
    assert (some + empty).value() == some.value() == 0.75
    # d (total / weight): 1 / weight for the total, and nothing where the mean is empty.
    for mean, slope in ((some, 0.25), (empty, 0.0)):
        grad = jax.grad(lambda x, mean=mean: Mean(x, mean.weight).value())(mean.total)
        assert (mean.value(), grad) == (mean.total / max(mean.weight, 1.0), slope)


def test_they_are_trees_of_arrays_that_keep_their_type():
    output = LossOutput(mean_of(1, 2), {"kl": mean_of(3, 4)})
    for struct, count in ((output, 4), (TokenLogprobs(jnp.ones(3), None), 1)):
        leaves, tree = jax.tree.flatten(struct)
        assert len(leaves) == count
        assert type(jax.tree.unflatten(tree, leaves)) is type(struct)
