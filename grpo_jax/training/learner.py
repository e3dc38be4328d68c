"""The learner: the state of training and the compiled functions that use it.

It scores a rollout under the reference (and, for several updates, under the policy as
it was), turns rewards into advantages and makes the updates.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PyTree

from grpo_jax.config import TrainConfig
from grpo_jax.models.packing import WORTHWHILE, pack
from grpo_jax.models.protocol import LanguageModel, RowScorer, in_compute_dtype
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel import offload
from grpo_jax.parallel.collectives import whole_over_fsdp
from grpo_jax.rollout.rollout import Rollout
from grpo_jax.training._like_lengths import like_lengths
from grpo_jax.training.advantages import advantages_and_mask
from grpo_jax.training.compiled import compile_train_step
from grpo_jax.training.optimizer import make_optimizer, make_schedule
from grpo_jax.training.state import (
    Batch,
    TrainState,
    make_train_state,
    policy_variables,
)
from grpo_jax.training.step import (
    Metrics,
    make_train_step,
    score_batch,
)


class Learner:
    """Holds the state, the frozen reference and the functions compiled for them.

    With `mesh.offload` the optimizer's moments or the reference stay in host memory
    between their uses. `state_on_devices` and `reference_on_devices` then copy them.

    Attributes:
      base: the frozen parameters under adapters; None without adapters.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: PyTree,
        config: TrainConfig,
        mesh: Mesh,
        *,
        base: PyTree | None = None,
    ) -> None:
        updates = config.steps * config.updates_per_step
        tx = make_optimizer(config.optimizer, total_updates=updates)
        self._config = config
        self._mesh = mesh
        self._schedule = make_schedule(config.optimizer, total_updates=updates)
        self._step = compile_train_step(
            make_train_step(model, tx, config), mesh, mode=config.mesh.mode
        )
        # Each process reads the rows of its own prompts.
        rows = meshes.batch_sharding(mesh)
        self._score = jax.jit(
            functools.partial(score_batch, model, config), out_shardings=rows
        )
        self._advantages = jax.jit(
            functools.partial(
                advantages_and_mask,
                config=config.objective,
                max_new_tokens=config.max_new_tokens,
            ),
            out_shardings=rows,
        )
        self._minibatch = jax.jit(
            functools.partial(_minibatch, count=config.minibatches), out_shardings=rows
        )
        # Under pmap each device cuts its own prompts into microbatches.
        cuts = config.mesh.mode == "pmap" and config.microbatch_size is not None
        self._saves_padding = config.packing == "auto" and not cuts
        self._packs = isinstance(model, RowScorer)
        self._compute_dtype = model.config.dtype
        self._copy_for_sampling: Callable[[PyTree], PyTree] | None = None
        if config.mesh.offload:
            offload.check_offload(mesh)
        self.base = base
        self.set_state(make_train_state(params, tx))
        self._reference: PyTree | None = None
        if config.objective.kl_coef:
            # Fresh adapters change nothing, so their base stands for the policy.
            params = self._frozen_params() if base is None else base
            self.set_reference({"params": params})

    @property
    def params(self) -> PyTree:
        """What is trained: all parameters, or adapters."""
        return self._state.params

    @property
    def variables(self) -> PyTree:
        """Linen variables of the policy."""
        return policy_variables(self.params, self.base)

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference policy; there is none without a KL penalty."""
        return self._reference is not None

    def state_on_devices(self) -> TrainState:
        """The state; moments that are offloaded are copied from the host first."""
        if "optimizer" not in self._config.mesh.offload:
            return self._state
        return self._state.replace(
            opt_state=offload.to_device_memory(self._state.opt_state)
        )

    def set_state(self, state: TrainState) -> None:
        """Replace the state; moments go to the host if they are offloaded."""
        if "optimizer" in self._config.mesh.offload:
            state = state.replace(opt_state=offload.to_host_memory(state.opt_state))
        self._state = state

    def reference_on_devices(self) -> PyTree:
        """Linen variables of the reference policy, copied from the host if offloaded.

        Only where `has_reference`.
        """
        if "reference" not in self._config.mesh.offload:
            return self._reference
        return offload.to_device_memory(self._reference)

    def set_reference(self, variables: PyTree) -> None:
        """Replace the reference policy; it goes to the host if it is offloaded."""
        if "reference" in self._config.mesh.offload:
            variables = offload.to_host_memory(variables)
        self._reference = variables

    def refresh_reference(self) -> None:
        """Make the policy as it is now the reference."""
        if self.has_reference:
            self.set_reference(policy_variables(self._frozen_params(), self.base))

    def release(self) -> TrainState:
        """Delete the state's arrays; return their shapes and shardings.

        A state like it can then be restored without two of them in memory at once.
        """
        state = self.state_on_devices()
        arrays = (state.params, state.opt_state)
        params, opt_state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            arrays,
        )
        for leaf in jax.tree.leaves(arrays):
            leaf.delete()
        return state.replace(params=params, opt_state=opt_state)

    def sampler_variables(self) -> PyTree:
        """Linen variables to sample with, for as long as they are needed.

        Where fsdp splits the parameters they are a copy in the compute dtype, gathered
        now and not at every token, unless `mesh.sampler` is "split".
        """
        variables = self.variables
        if self._mesh.shape["fsdp"] == 1 or self._config.mesh.sampler == "split":
            return variables
        if self._copy_for_sampling is None:
            places = jax.tree.map(lambda x: whole_over_fsdp(x.sharding), variables)
            cast = functools.partial(in_compute_dtype, dtype=self._compute_dtype)
            self._copy_for_sampling = jax.jit(cast, out_shardings=places)
        return self._copy_for_sampling(variables)

    def score(self, rollout: Rollout) -> Batch:
        """The rollout on the devices, with the log-probs that its updates will need.

        Returns at once, while the devices still compute.
        """
        mask = rollout.mask & rollout.keep[:, None, None]
        arrays = {
            "prompts": rollout.prompts,
            "prompt_lengths": rollout.prompt_lengths,
            "completions": rollout.tokens,
            "mask": mask,
            "advantages": np.zeros(rollout.lengths.shape, np.float32),
            "sampler_logp": rollout.logp,
        }
        if self._saves_padding:
            arrays |= self._without_padding(mask, rollout.prompts.shape[1])
        if rollout.began_before is not None:
            # Of others the cache has keys and values of earlier policies, which count
            # in what the present one draws.
            fresh = rollout.mask & ~rollout.began_before[:, None, None]
            arrays["fresh"] = fresh
        batch = Batch(**meshes.to_mesh(self._mesh, arrays))
        ref_logp = old_logp = None
        if self.has_reference:
            ref_logp = self._score(self.reference_on_devices(), batch)
        if self._config.rollout.carry_over:
            # The policies that drew the tokens are gone. So is the need for them: the
            # ratio is taken against what each token was drawn with.
            old_logp = batch.sampler_logp
        elif self._config.updates_per_step > 1:
            old_logp = self._score(self.variables, batch)
        return batch.replace(ref_logp=ref_logp, old_logp=old_logp)

    def _without_padding(
        self, mask: Bool[np.ndarray, "N G T"], prompt_tokens: int
    ) -> dict[str, Any]:
        """The field of the batch that leaves least padding; none if all is full."""
        how = {
            "minibatches": self._config.minibatches,
            "microbatch_size": self._config.microbatch_size,
            "shards": meshes.batch_shards(self._mesh),
        }
        order, share = like_lengths(mask, prompt_tokens, **how)
        if self._packs:
            packing = pack(mask, prompt_tokens, rival=share, **how)
            if packing is not None:
                return {"packing": packing}
        return {"like_lengths": order} if share <= WORTHWHILE else {}

    def with_advantages(self, batch: Batch, rollout: Rollout) -> Batch:
        """The batch with the advantages of the rollout's rewards."""
        # A group that is left out must not enter the deviation of a batch either.
        kept = np.where(rollout.keep[:, None], rollout.rewards, np.nan)
        # Tokens that were given are not the policy's length.
        drawn = rollout.mask.sum(axis=-1, dtype=np.int32)
        rewards, lengths, finished = meshes.to_mesh(
            self._mesh, (kept.astype(np.float32), drawn, rollout.finished)
        )
        advantages, mask = self._advantages(
            rewards, batch, lengths=lengths, finished=finished
        )
        return batch.replace(advantages=advantages, mask=mask)

    def update(self, batch: Batch) -> dict[str, float]:
        """Make the updates of one rollout; their metrics, averaged, maxima kept."""
        start = time.perf_counter()
        state, results = self.state_on_devices(), []
        count = self._config.minibatches
        for _ in range(self._config.updates_per_rollout):
            for number in range(count):
                part = batch if count == 1 else self._minibatch(batch, number)
                state, metrics = self._step(state, part, self.base)
                results.append(metrics)
        self.set_state(state)
        fetched: list[Metrics] = jax.device_get(results)
        metrics = {
            name: float(np.mean([values[name] for values in fetched]))
            for name in fetched[0]
        }
        if batch.fresh is not None:
            # Of the first update: later ones have moved away from the sampler.
            metrics["sampler_logp_diff/max"] = float(
                fetched[0]["sampler_logp_diff/max"]
            )
        elif batch.old_logp is not None:
            # Later updates differ from the sampler because they moved away from it, and
            # the first may see only a part, so the policy before all of them counts.
            largest = _largest_difference(
                batch.old_logp, batch.sampler_logp, batch.mask
            )
            metrics["sampler_logp_diff/max"] = float(largest)
        metrics["learning_rate"] = float(
            np.asarray(self._schedule(int(state.step) - 1))
        )
        metrics["time/update"] = time.perf_counter() - start
        return metrics

    def _frozen_params(self) -> PyTree:
        """A copy in the compute dtype: the state's arrays are donated to the update."""
        cast = in_compute_dtype(self.params, self._compute_dtype)
        # A leaf that has this dtype already is not copied by the cast.
        return jax.tree.map(
            lambda new, old: jnp.copy(new) if new is old else new, cast, self.params
        )


@jax.jit
def _largest_difference(
    logp: Float[Array, "N G T"],
    sampler_logp: Float[Array, "N G T"],
    mask: Bool[Array, "N G T"],
) -> Float[Array, ""]:
    """The largest |logp - sampler_logp|, nats, of tokens under the mask; 0 of none."""
    return jnp.max(jnp.where(mask, jnp.abs(logp - sampler_logp), 0.0))


def _minibatch(batch: Batch, number: Array, *, count: int) -> Batch:
    """Prompt i goes to minibatch i mod count, so each is spread over all devices."""

    def part(x: Array) -> Array:
        return x.reshape(-1, count, *x.shape[1:])[:, number]

    return jax.tree.map(part, batch)
