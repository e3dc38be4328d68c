"""Every argument of every public function is refused by the name the caller wrote."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import objective

TOKENS = jnp.full((2, 3), -1.0)
MASK = jnp.ones((2, 3), bool)
IDS = jnp.zeros((2, 3), int)
ROWS = jnp.ones(2)
GROUP = {"rewards": jnp.ones((2, 3)), "valid": MASK}
LOSS = {
    "logp": TOKENS,
    "mask": MASK,
    "advantages": ROWS,
    "old_logp": TOKENS,
    "ref_logp": TOKENS,
    "sampler_logp": TOKENS,
    "entropy": TOKENS,
}
# The arrays of a right call, and the numbers that it needs or that have no default.
CALLS = {
    "aggregate": {"values": TOKENS, "mask": MASK, "mode": "fixed_length"},
    "centered_advantages": GROUP,
    "chunked_logprobs": {
        "hidden": jnp.ones((2, 3, 4)),
        "head": jnp.ones((4, 5)),
        "tokens": IDS,
    },
    "cispo_surrogate": {
        "logp": TOKENS,
        "log_ratio": TOKENS,
        "advantages": ROWS,
        "max_weight": 5.0,
    },
    "clipped_surrogate": {"log_ratio": TOKENS, "advantages": ROWS},
    "group_softmax_weights": GROUP,
    "grpo_loss": LOSS,
    "importance_correction": {"old_logp": TOKENS, "sampler_logp": TOKENS},
    "importance_ratio": {"log_ratio": TOKENS},
    "kl_estimate": {"logp": TOKENS, "ref_logp": TOKENS},
    "leave_one_out_advantages": GROUP,
    "log_importance_ratio": {"logp": TOKENS, "old_logp": TOKENS, "mask": MASK},
    "overlong_penalty": {"lengths": IDS, "max_length": 8, "cache": 4},
    "sequence_logprobs": {"logp": TOKENS, "mask": MASK},
    "softmax_advantages": GROUP,
    "standardized_advantages": GROUP,
    "token_entropy": {"logits": jnp.ones((2, 3, 5))},
    "token_logprobs": {"logits": jnp.ones((2, 3, 5)), "tokens": IDS},
    "weighted_likelihood_loss": {"logp": TOKENS, "mask": MASK, "weights": ROWS},
}
NUMBERS = [np.nan, np.inf, -np.inf, np.float32("nan"), "0.2", True, [0.2], 1j, ROWS]
# By what stands in the annotation; None is added where it does not mean "off".
WRONG = {
    "Literal": ["no such choice", 3, ["token"], ROWS],
    "jaxtyping": ["abc", [[1.0, 2.0, 3.0]] * 2, np.array([["a", None]])],
    "bool": [1, "yes", ROWS],
    "int": [*NUMBERS, 0, 2.5],
    "float": NUMBERS,
}


def wrong_arguments(function):
    """Names of arguments, each with a value that it must refuse."""
    parameters = inspect.signature(getattr(objective, function)).parameters
    for name, parameter in parameters.items():
        kind = next(k for k in WRONG if k in str(parameter.annotation))
        wrong = WRONG[kind] + [None] * (parameter.default is not None)
        yield from ((name, value) for value in wrong)


def call(function, **changes):
    return getattr(objective, function)(**CALLS[function] | changes)


def test_every_public_function_is_called_here():
    public = {n for n in objective.__all__ if inspect.isfunction(getattr(objective, n))}
    assert public == set(CALLS)
    for function in CALLS:
        call(function)


@pytest.mark.parametrize("function", CALLS)
def test_a_wrong_argument_is_named_as_the_caller_wrote_it(
    function, without_shape_checks
):
    for name, wrong in wrong_arguments(function):
        with pytest.raises(ValueError, match=f"^{name} (is|has) "):
            call(function, **{name: wrong})


@pytest.mark.parametrize("surrogate", ["clip", "cispo", "likelihood"])
def test_a_number_is_refused_where_it_is_not_used_as_well(surrogate):
    right = {"surrogate": surrogate, "cispo_max_weight": 5.0}
    for name in ("clip_low", "clip_high", "dual_clip", "cispo_max_weight"):
        with pytest.raises(ValueError, match=f"^{name} is nan, expected"):
            call("grpo_loss", **right | {name: np.nan})


@pytest.mark.parametrize(
    ("function", "name", "bound"),
    [
        ("grpo_loss", "clip_low", 0.0),
        ("grpo_loss", "clip_high", 0.0),
        ("standardized_advantages", "eps", 0.0),
    ],
)
def test_a_bound_that_is_allowed_is_allowed_and_below_is_not(function, name, bound):
    call(function, **{name: bound})
    with pytest.raises(
        ValueError, match=f"^{name} is -1e-09, expected a finite number of at"
    ):
        call(function, **{name: bound - 1e-9})


@pytest.mark.parametrize("number", [1, 0.5, np.float32(0.5), np.int64(1), jnp.ones(())])
def test_numbers_of_python_numpy_and_jax_are_numbers(number, without_shape_checks):
    call("token_logprobs", temperature=number)
    call("grpo_loss", clip_low=number, kl_coef=number)


def test_a_traced_number_is_refused_by_name_and_a_static_one_taken(
    without_shape_checks,
):
    def entropy(temperature):
        return call("token_entropy", temperature=temperature)

    with pytest.raises(ValueError, match="^temperature is traced, expected a number t"):
        jax.jit(entropy)(0.5)
    jax.jit(entropy, static_argnums=0)(0.5)
