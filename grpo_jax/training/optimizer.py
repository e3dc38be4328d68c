"""AdamW with its learning-rate schedule, as an Optax chain."""

import jax
import optax
from jaxtyping import PyTree

from grpo_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, *, total_updates: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates made.

    It rises linearly from 0 over `warmup_steps`, then stays ("constant"), follows half
    a cosine to 0 ("cosine") or falls linearly to 0 ("linear") at `total_updates`.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(total_updates - warmup, 1)
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest)
        case "linear":
            after = optax.linear_schedule(peak, 0.0, rest)
    if warmup == 0:
        return after
    # The first update already moves: a rate of 0 would waste a rollout.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: OptimizerConfig, *, total_updates: int
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov and Hutter 2019).

    https://arxiv.org/abs/1711.05101. Weight decay reaches matrices only, not norms and
    biases, as is usual.
    """
    adamw = optax.adamw(
        make_schedule(config, total_updates=total_updates),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=_matrices,
    )
    if config.max_grad_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def _matrices(params: PyTree) -> PyTree:
    """True for the parameters that multiply, False for norms and biases."""

    def multiplies(path: tuple, _: object) -> bool:
        return path[-1].key not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(multiplies, params)
