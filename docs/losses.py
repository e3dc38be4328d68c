# %% [markdown]
# # The losses in your own code
#
# The losses of GRPO are plain functions from arrays to arrays. They need no model, no
# configuration and no trainer. This page is a notebook in percent format
# (`docs/losses.py`). Run it with `python docs/losses.py`, or open it in an editor that
# supports such cells.
#
# Shapes: `N` prompts, `G` completions of each, `T` tokens of each completion, `V`
# vocabulary.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax import (
    chunked_logprobs,
    group_softmax_weights,
    grpo_loss,
    softmax_advantages,
    standardized_advantages,
    token_logprobs,
    weighted_likelihood_loss,
)

# %% [markdown]
# ## From rewards to weights
#
# Rewards are `[N, G]`: each row is a group. The softmax weights of a group sum to 1; as
# advantages, `G * weights - 1`, they have mean 0. A group of equal rewards has
# advantages of exactly 0.

# %%
rewards = jnp.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
print(group_softmax_weights(rewards))
print(softmax_advantages(rewards))
print(standardized_advantages(rewards))

# %% [markdown]
# `valid` marks the completions that have a reward. The others are left out of the
# statistics of their group and get 0. Their rewards, even NaN, are not used.

# %%
unscored = jnp.array([1.0, 0.0, jnp.nan, 1.0])
print(softmax_advantages(unscored, valid=~jnp.isnan(unscored)))

# %% [markdown]
# ## A policy
#
# Any function that returns logits can be the policy. This one depends only on the
# position: it has one row of logits per token. The reward is the share of tokens that
# equal a target.

# %%
N, G, T, V = 2, 16, 4, 8
target = jnp.array([3, 1, 4, 1])


@jax.jit
def sample(logits, key):
    """Token ids [N, G, T], drawn from logits [T, V]."""
    return jax.random.categorical(key, logits, shape=(N, G, T))


def score(logits, tokens):
    """Log-probabilities [N, G, T] of the tokens, in nats."""
    return token_logprobs(jnp.broadcast_to(logits, (N, G, T, V)), tokens)


def reward(tokens):
    """Shares [N, G] of right tokens."""
    return jnp.mean(tokens == target, axis=-1)


# %% [markdown]
# ## Two losses
#
# `weighted_likelihood_loss` is the simple form, $-\sum_i w_i \log \pi(y_i|x)$.
# `grpo_loss` is the full form, with ratio, clip and, optionally, KL and entropy.
# Both return their loss as a `Mean`, a total and a weight; `value()` divides. The mask
# selects the tokens that count: here all, usually those up to the end of a completion.

# %%
mask = jnp.ones((N, G, T), bool)


def simple(logits, tokens):
    """The weighted likelihood of a group's own completions."""
    weights = group_softmax_weights(reward(tokens), temperature=0.1)
    return weighted_likelihood_loss(score(logits, tokens), mask, weights).value()


def clipped(logits, tokens):
    """The clipped ratio, on-policy: without old_logp the ratio is 1."""
    advantages = softmax_advantages(reward(tokens), temperature=0.1)
    return grpo_loss(score(logits, tokens), mask, advantages).loss.value()


def trained(loss, steps=60):
    """The mean reward before and after plain gradient steps."""
    optimizer = optax.adam(0.1)

    @jax.jit
    def step(logits, state, tokens):
        value, gradient = jax.value_and_grad(loss)(logits, tokens)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(logits, updates), state, value, reward(tokens).mean()

    logits = jnp.zeros((T, V))
    state, history = optimizer.init(logits), []
    for number in range(steps):
        tokens = sample(logits, jax.random.fold_in(jax.random.key(0), number))
        logits, state, value, mean = step(logits, state, tokens)
        history.append((float(value), float(mean)))
    return history


for loss in (simple, clipped):
    history = trained(loss)
    first, last = history[0], history[-1]
    print(f"{loss.__name__}: reward {first[1]:.2f} -> {last[1]:.2f}, ", end="")
    print(f"loss {first[0]:.3f} -> {last[0]:.3f}")
    assert last[1] > 0.9

# %% [markdown]
# The clipped loss stays 0, although the policy learns. At ratio 1 its *value* is minus
# the mean advantage, which is 0, but its *gradient* is not 0
# ([theory](theory.md#at-ratio-1-they-have-the-same-gradient)). Watch the reward.
#
# ## Several updates on one batch
#
# From the second update on, the policy is no longer the one that sampled. Pass the
# log-probabilities from before the first update as `old_logp`; then the clip takes
# effect. `ref_logp` and `kl_coef` add a KL to a reference.

# %%
uniform = jnp.zeros((T, V))
tokens = sample(uniform, jax.random.key(1))
advantages = standardized_advantages(reward(tokens))
old_logp = score(uniform, tokens)


@jax.jit
def second_update(logits):
    """The metrics of a loss on tokens that another policy has sampled."""
    output = grpo_loss(
        score(logits, tokens),
        mask,
        advantages,
        old_logp=old_logp,
        ref_logp=old_logp,
        kl_coef=0.04,
        clip_low=0.2,
        clip_high=0.28,
        aggregation="token_mean",
    )
    return {name: mean.value() for name, mean in output.metrics.items()}


moved = uniform.at[jnp.arange(T), target].set(1.0)
for name, value in second_update(moved).items():
    print(f"{name:24} {value:.4f}")

# %% [markdown]
# ## Microbatches and devices
#
# A `Mean` can be added to another: sum the parts over microbatches, devices or hosts,
# and divide once. The result does not depend on how the batch was split, up to
# rounding. (The average of averages does.)

# %%
lengths = jnp.array([[1] * G, [T] * G])  # short completions, and long ones
ragged = jnp.arange(T) < lengths[..., None]


@jax.jit
def loss_of(logp, mask, advantages, old_logp):
    """The loss of some prompts, not yet divided."""
    return grpo_loss(
        logp, mask, advantages, old_logp=old_logp, aggregation="token_mean"
    ).loss


batch = (score(moved, tokens), ragged, advantages, old_logp)
whole = loss_of(*batch)
first, second = (loss_of(*(array[n : n + 1] for array in batch)) for n in range(N))
together = first + second
averaged = (first.value() + second.value()) / 2
print(f"whole {whole.value():.4f}, parts added {together.value():.4f}, ", end="")
print(f"averages averaged {averaged:.4f}")
assert abs(whole.value() - together.value()) < 1e-6

# %% [markdown]
# ## Large vocabularies
#
# Logits of 4,096 tokens over a vocabulary of 150,000 are 2.3 GiB, and their gradient as
# much again. `chunked_logprobs` computes log-probabilities from hidden states with one
# chunk of logits at a time, forward and backward. The results are those of the dense
# computation.

# %%
numbers = np.random.default_rng(0)
hidden = jnp.asarray(numbers.normal(size=(N, G, T, 32)))
head = jnp.asarray(numbers.normal(size=(32, V)))
dense = jax.jit(token_logprobs)(hidden @ head, tokens)
chunked = jax.jit(chunked_logprobs)(hidden, head, tokens)
print(abs(chunked.logp - dense).max() < 1e-4)

# %% [markdown]
# All functions with their arguments: [the objective](api/objective.md). Formulas,
# sources and proofs: [theory](theory.md).
