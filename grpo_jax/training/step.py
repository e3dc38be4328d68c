"""The programs of an update: score completions, and make one step of the optimizer.

`make_train_step` gives log-probabilities, loss, gradient, update, as one pure function.

Gradients of totals and the weights they belong to are summed over microbatches (and
devices, under pmap) and divided once, so how the work is cut changes rounding only.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from grpo_jax import objective
from grpo_jax.config import TrainConfig
from grpo_jax.models.protocol import LanguageModel
from grpo_jax.objective import Mean
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.collectives import place_for_matmul
from grpo_jax.training.state import Batch, TrainState, policy_variables

# Fields of `Batch` with a group axis behind that of the prompts.
_PER_COMPLETION = (
    "completions",
    "mask",
    "advantages",
    "sampler_logp",
    "fresh",
    "old_logp",
    "ref_logp",
)
# Axis name of the devices under pmap.
_DEVICES = "devices"

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
) -> objective.TokenLogprobs:
    """Log-probability of each completion token, nats, each prompt computed once."""
    hidden: Any = model.apply(
        variables, prompts, prompt_lengths, completions, method=model.score
    )
    head: Any = model.apply(variables, method=model.head)
    hidden, head = place_for_matmul(hidden, head)
    return objective.chunked_logprobs(
        hidden,
        head,
        completions,
        temperature=temperature,
        logit_softcap=model.config.logit_softcap,
        with_entropy=with_entropy,
    )


def score_batch(
    model: LanguageModel, config: TrainConfig, variables: PyTree, batch: Batch
) -> Float[Array, "N G T"]:
    """Log-probs of the completions under `variables`, microbatch by microbatch."""
    group = batch.completions.shape[1]
    size = config.microbatch_size
    whole_groups = None if size is None else max(size, group)

    def score(part: Batch) -> Float[Array, "n G T"]:
        return policy_logprobs(
            model,
            variables,
            part.prompts,
            part.prompt_lengths,
            part.completions,
            temperature=config.sampling.temperature,
        ).logp

    parts = _microbatches(batch, whole_groups)
    if parts.prompts.shape[0] == 1:
        return score(jax.tree.map(lambda leaf: leaf[0], parts))
    logp = lax.map(score, parts)
    return jnp.moveaxis(logp, 0, 1).reshape(batch.completions.shape)


def _microbatches(batch: Batch, sequences: int | None) -> Batch:
    """The batch with a leading axis of microbatches of `sequences` sequences each.

    Prompt i goes to microbatch i mod count, so that under a mesh each microbatch is
    spread over all devices as the batch was. A microbatch smaller than a group holds a
    part of the completions of one prompt.
    """
    prompts, group = batch.completions.shape[:2]
    size = min(sequences or prompts * group, prompts * group)
    count = prompts * group // max(size, group)
    parts_of_group = max(group // size, 1)

    def by_prompt(leaf: Array) -> Array:
        parts = leaf.reshape(prompts // count, count, *leaf.shape[1:])
        parts = jnp.moveaxis(parts, 1, 0)
        return jnp.repeat(parts, parts_of_group, axis=0)

    def by_completion(leaf: Array) -> Array:
        if parts_of_group == 1:
            return by_prompt(leaf)
        return leaf.reshape(count * parts_of_group, 1, size, *leaf.shape[2:])

    return Batch(
        prompts=by_prompt(batch.prompts),
        prompt_lengths=by_prompt(batch.prompt_lengths),
        **{
            name: jax.tree.map(by_completion, vars(batch)[name])
            for name in _PER_COMPLETION
        },
    )


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
    """

    def step(
        state: TrainState,
        batch: Batch,
        base: PyTree | None = None,
        *,
        axis_name: str | None = None,
        places: PyTree | None = None,
    ) -> tuple[TrainState, Metrics]:
        loss = functools.partial(_loss_totals, model, config, base)
        parts = _microbatches(batch, config.microbatch_size)
        grads, sums, largest = _accumulate(loss, state.params, parts, places)
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


def compile_train_step(
    step: TrainStep, mesh: Mesh, mode: Literal["jit", "pmap"] = "jit"
) -> TrainStep:
    """The step compiled for a mesh; the state given to it is donated.

    "jit" follows the shardings of the state, which the new state keeps. "pmap" runs the
    same step as plain data parallelism: the state is on every device, the batch is
    split over all of them. A frozen base is not donated: the reference policy shares
    its arrays.

    Raises:
      ValueError: for another mode; under pmap, when called, for a number of prompts
        that the devices do not divide.
    """
    if mode == "jit":
        return _JitStep(step)
    if mode == "pmap":
        return _pmap_step(step, mesh)
    raise ValueError(f"mode must be 'jit' or 'pmap', got {mode!r}.")


class _JitStep:
    """Compiles at the first call, when the shardings of the state are known."""

    def __init__(self, step: TrainStep) -> None:
        self._step = step
        self._compiled: Any = None

    def __call__(
        self, state: TrainState, batch: Batch, base: PyTree | None = None
    ) -> tuple[TrainState, Metrics]:
        if self._compiled is None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
            # The first call then has the layout of every later one; otherwise jit
            # compiles the step twice.
            state = jax.device_put(state, shardings)
            self._compiled = jax.jit(
                functools.partial(self._step, places=shardings.params),
                donate_argnums=0,
                out_shardings=(shardings, None),
            )
        return self._compiled(state, batch, base)


def _pmap_step(step: TrainStep, mesh: Mesh) -> TrainStep:
    devices = list(mesh.devices.flat)
    own, everywhere = Mesh(devices, (_DEVICES,)), meshes.replicated(mesh)
    mapped = jax.pmap(
        functools.partial(step, axis_name=_DEVICES),
        axis_name=_DEVICES,
        in_axes=(None, 0, None),
        out_axes=(None, None),
        devices=devices,
        donate_argnums=0,
    )

    def call(
        state: TrainState, batch: Batch, base: PyTree | None = None
    ) -> tuple[TrainState, Metrics]:
        prompts = batch.prompts.shape[0]
        if prompts % len(devices):
            raise ValueError(
                f"{prompts} prompts cannot be split over {len(devices)} devices; use "
                f"{-(-prompts // len(devices)) * len(devices)}."
            )
        split = lambda leaf: leaf.reshape(len(devices), -1, *leaf.shape[1:])  # noqa: E731
        batch = jax.tree.map(split, batch)
        state, base = jax.device_put((state, base), everywhere)
        # A map has one axis, its own: the names of the mesh's axes mean nothing in it.
        with jax.set_mesh(own), nn.logical_axis_rules(()):
            results = mapped(state, batch, base)
        # The same buffers, as arrays of the mesh that everything else runs on.
        return jax.device_put(results, everywhere)

    return call


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
    return output.loss.total, (sums, {"sampler_logp_diff/max": largest})


def _accumulate(
    loss: Callable[..., Any], params: PyTree, parts: Batch, places: PyTree | None
) -> tuple[PyTree, dict[str, Mean], Metrics]:
    """Sums over the microbatches of the gradient and of the metrics, and the maxima."""
    gradient = jax.grad(loss, has_aux=True)

    def totals(part: Batch) -> tuple[PyTree, dict[str, Mean], Metrics]:
        grads, (sums, largest) = gradient(params, part)
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
