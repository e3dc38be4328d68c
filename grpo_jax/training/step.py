"""The programs of an update: score completions, and make one step of the optimizer.

`make_train_step` gives log-probabilities, loss, gradient, update, as one pure function.

Gradients of totals and the weights they belong to are summed over microbatches (and
devices, under pmap) and divided once, so how the work is cut changes rounding only.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from grpo_jax import objective
from grpo_jax.config import TrainConfig
from grpo_jax.models.limits import experts_per_token
from grpo_jax.models.packing import Packing, completion_states
from grpo_jax.models.protocol import LanguageModel
from grpo_jax.objective import Mean
from grpo_jax.parallel.collectives import matmul_over_fsdp
from grpo_jax.training._balance import with_balance
from grpo_jax.training._like_lengths import at_own_width
from grpo_jax.training._microbatches import microbatches, narrow
from grpo_jax.training.state import Batch, TrainState, policy_variables

Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def policy_logprobs(
    model: LanguageModel,
    variables: PyTree,
    prompts: Int[Array, "N P"],
    prompt_lengths: Int[Array, " N"],
    completions: Int[Array, "N G T"],
    *,
    temperature: float,
    with_entropy: bool = False,
    with_routers: bool = False,
    packing: Packing | None = None,
) -> objective.TokenLogprobs:
    """Log-probability of each completion token, nats, each prompt computed once.

    With `packing` tokens that stand in no row have 0; the others are the same.
    """
    given: Any = (model, variables, prompts, prompt_lengths, completions)
    how: Any = {"packing": packing, "with_routers": with_routers}
    hidden, targets, routers = completion_states(*given, **how)
    head: Any = model.apply(variables, method=model.head)
    scored = matmul_over_fsdp(
        objective.chunked_logprobs,
        hidden,
        head,
        targets,
        temperature=temperature,
        logit_softcap=model.config.logit_softcap,
        with_entropy=with_entropy,
    )
    if packing is not None:
        scored = jax.tree.map(lambda x: packing.unpack(x, completions), scored)
    return scored.replace(routers=routers)


def score_batch(
    model: LanguageModel, config: TrainConfig, variables: PyTree, batch: Batch
) -> Float[Array, "N G T"]:
    """Log-probs of the completions under `variables`, microbatch by microbatch."""
    prompts, group = batch.completions.shape[:2]
    # As many as an update holds, and whole groups.
    size = config.microbatch_size or prompts * group // config.minibatches

    def score(part: Batch) -> Float[Array, "n G T"]:
        return policy_logprobs(
            model,
            variables,
            part.prompts,
            part.prompt_lengths,
            part.completions,
            temperature=config.sampling.temperature,
            packing=part.packing,
        ).logp

    order = batch.like_lengths
    if config.minibatches > 1:  # the order is one within a minibatch
        order = None
    parts, widths = microbatches(batch.replace(like_lengths=order), max(size, group))

    def padded(part: Batch, width: int) -> Float[Array, "n G T"]:
        rest = part.completions.shape[2] - width
        return jnp.pad(score(narrow(part, width)), ((0, 0), (0, 0), (0, rest)))

    def at_width(part: Batch) -> Float[Array, "n G T"]:
        return at_own_width(functools.partial(padded, part), part.mask, widths)

    if parts.prompts.shape[0] == 1:
        logp = at_width(jax.tree.map(lambda leaf: leaf[0], parts))
    else:
        logp = jnp.moveaxis(lax.map(at_width, parts), 0, 1)
        logp = logp.reshape(batch.completions.shape)
    return logp if order is None else order.unsort(logp)


def make_train_step(
    model: LanguageModel, tx: optax.GradientTransformation, config: TrainConfig
) -> TrainStep:
    """A pure ``step(state, batch, base, *, axis_name, places) -> (state, metrics)``.

    `base` holds the frozen parameters under adapters; it is None (the default) where
    all parameters are trained. The state is returned unchanged, with
    ``update_skipped`` 1, when the loss or the gradient is not finite. `axis_name` names
    the mapped axis if the step runs under `pmap`; `places` are the shardings of the
    parameters, which gradients then have too. Metrics are scalars: the loss and those
    of `objective.grpo_loss`, ``grad_norm`` before clipping, ``sampler_logp_diff/max``
    and ``update_skipped``.

    Raises:
      ValueError: a loss that balances experts, for a model without them.
    """
    if config.objective.router_aux_loss_coef:
        experts_per_token(model)

    def step(
        state: TrainState,
        batch: Batch,
        base: PyTree | None = None,
        *,
        axis_name: str | None = None,
        places: PyTree | None = None,
    ) -> tuple[TrainState, Metrics]:
        loss = functools.partial(_loss_totals, model, config, base)
        parts = microbatches(batch, config.microbatch_size)
        grads, sums, largest = _accumulate(loss, state.params, *parts, places=places)
        if axis_name is not None:
            grads, sums = lax.psum((grads, sums), axis_name)
            largest = lax.pmax(largest, axis_name)
        weight = sums["loss"].weight
        grads = jax.tree.map(lambda g: g / jnp.where(weight == 0.0, 1.0, weight), grads)
        metrics = {name: mean.value() for name, mean in sums.items()} | largest
        metrics["grad_norm"] = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        metrics["update_skipped"] = 1.0 - finite.astype(jnp.float32)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        )
        # The same state again if something is not finite.
        return jax.tree.map(functools.partial(jnp.where, finite), new, state), metrics

    return step


def _loss_totals(
    model: LanguageModel,
    config: TrainConfig,
    base: PyTree | None,
    params: PyTree,
    batch: Batch,
) -> tuple[Float[Array, ""], tuple[dict[str, Mean], Metrics]]:
    """The total of the loss over a microbatch, with sums and maxima for the metrics."""
    chosen = config.objective
    scored = policy_logprobs(
        model,
        policy_variables(params, base),
        batch.prompts,
        batch.prompt_lengths,
        batch.completions,
        temperature=config.sampling.temperature,
        with_entropy=True,
        with_routers=chosen.router_aux_loss_coef > 0,
        packing=batch.packing,
    )
    output = objective.grpo_loss(
        scored.logp,
        batch.mask,
        batch.advantages,
        old_logp=batch.old_logp,
        ref_logp=batch.ref_logp,
        sampler_logp=batch.sampler_logp,
        entropy=scored.entropy,
        surrogate=chosen.surrogate,
        ratio_level=chosen.ratio_level,
        clip_low=chosen.clip_low,
        clip_high=chosen.clip_high,
        dual_clip=chosen.dual_clip,
        cispo_max_weight=chosen.cispo_max_weight,
        kl_coef=chosen.kl_coef if chosen.kl_in == "loss" else 0.0,
        kl_estimator=chosen.kl_estimator,
        entropy_coef=chosen.entropy_coef,
        sampler_correction_cap=chosen.sampler_correction_cap,
        aggregation=chosen.aggregation,
        max_length=config.max_new_tokens,
    )
    difference = jnp.abs(lax.stop_gradient(scored.logp) - batch.sampler_logp)
    # Other policies drew the other tokens.
    fresh = batch.mask if batch.fresh is None else batch.mask & batch.fresh
    largest = jnp.max(jnp.where(fresh, difference, 0.0))
    sums = {"loss": output.loss} | output.metrics
    if scored.routers is not None:
        given = output.loss, scored.routers, batch, chosen.router_aux_loss_coef
        sums |= with_balance(*given, model=model)
    return sums["loss"].total, (sums, {"sampler_logp_diff/max": largest})


def _accumulate(
    loss: Callable[..., Any],
    params: PyTree,
    parts: Batch,
    widths: tuple[int, ...],
    *,
    places: PyTree | None,
) -> tuple[PyTree, dict[str, Mean], Metrics]:
    """Sums over the microbatches of the gradient and of the metrics, and the maxima."""
    gradient = jax.grad(loss, has_aux=True)

    def totals(part: Batch) -> tuple[PyTree, dict[str, Mean], Metrics]:
        at_width = lambda width: gradient(params, narrow(part, width))  # noqa: E731
        grads, (sums, largest) = at_own_width(at_width, part.mask, widths)
        if places is not None:
            grads = lax.with_sharding_constraint(grads, places)
        return grads, sums, largest

    first = jax.tree.map(lambda leaf: leaf[0], parts)
    if parts.prompts.shape[0] == 1:
        return totals(first)

    def add(carry: Any, part: Batch) -> tuple[Any, None]:
        grads, sums, largest = totals(part)
        grads, sums = jax.tree.map(jnp.add, (carry[0], carry[1]), (grads, sums))
        return (grads, sums, jax.tree.map(jnp.maximum, carry[2], largest)), None

    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(totals, first)
    )
    return lax.scan(add, zeros, parts)[0]
