"""The programs of a run for devices that are only described, from its configuration.

Nothing is loaded: parameters, moments and batches are shapes with shardings. The
functions are those that a run compiles.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.stages import Lowered
from jaxtyping import PyTree

from grpo_jax.config import TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params, param_axes
from grpo_jax.models.lora import init_lora, lora_axes
from grpo_jax.models.protocol import in_compute_dtype
from grpo_jax.models.quantized import Kind, abstract_quantized
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.collectives import whole_over_fsdp
from grpo_jax.planning.memory import evaluation_batch, is_evaluated
from grpo_jax.planning.resolve import for_updates
from grpo_jax.rollout.lowered import on_mesh, sampler_programs
from grpo_jax.training.optimizer import make_optimizer
from grpo_jax.training.state import (
    Batch,
    TrainState,
    make_train_state,
    policy_variables,
)
from grpo_jax.training.step import make_train_step, score_batch


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a run.

    Attributes:
      phase: the phase of the run, as in an estimate of memory.
      name: what it does.
      lower: what compiles, when called.
      others: bytes of a device that the run holds meanwhile beside its arguments.
      times: how often it runs in a step; 0 in an evaluation.
      turns: how often the loop over tokens runs, of which its text does not say so.
    """

    phase: str
    name: str
    lower: Callable[[], Lowered]
    others: int
    times: int
    turns: int = 1


def lowered_programs(
    model: ModelConfig, config: TrainConfig, mesh: Mesh
) -> Iterator[Program]:
    """The programs of a step and of an evaluation, in the order in which they run.

    Args:
      model: with the compute dtype and remat of the run.
      config: without "auto" for remat and the sampler; see `resolve_auto`.
      mesh: of devices that may only be described.

    Raises:
      ValueError: under pmap, whose programs are not described by shapes.
    """
    if config.mesh.mode == "pmap":
        raise ValueError(
            "mesh.mode 'pmap' cannot be compiled ahead of a run; 'jit' with data -1 "
            "and fsdp 1 is the same data parallelism."
        )
    run = _Run(model, config, mesh)
    yield from run.sampling("rollout")
    yield from run.learning()
    if is_evaluated(config):
        yield from run.sampling("evaluation")


@dataclasses.dataclass(frozen=True)
class _Run:
    """Shapes of what a run holds, where it holds them."""

    config_of_model: ModelConfig
    config: TrainConfig
    mesh: Mesh

    @functools.cached_property
    def model(self) -> Decoder:
        scale = self.config.lora.scale
        return Decoder(dataclasses.replace(self.config_of_model, lora_scale=scale))

    @functools.cached_property
    def scorer(self) -> Decoder:
        """The model of scoring and updates."""
        chosen = for_updates(self.model.config, self.config, self.mesh)
        return Decoder(chosen)

    @functools.cached_property
    def whole(self) -> PyTree:
        """All parameters, float32."""
        return self._whole(None)

    def _whole(self, kind: Kind | None) -> PyTree:
        shapes = abstract_params(self.model)
        places = meshes.parameter_shardings(param_axes(self.model), shapes, self.mesh)
        return abstract_quantized(shapes, places, kind)

    @functools.cached_property
    def base(self) -> PyTree | None:
        """The frozen parameters under adapters."""
        if self.config.lora.rank is None:
            return None
        stored = self._whole(self.config.lora.quantized)
        return self._cast(stored, self.model.config.dtype)

    @functools.cached_property
    def state(self) -> TrainState:
        """What is trained, with its moments where the parameters are."""
        lora, params = self.config.lora, self.whole
        if lora.rank is not None:
            init = functools.partial(
                init_lora, self.model, rank=lora.rank, targets=lora.targets
            )
            shapes = jax.eval_shape(init, jax.random.key(0))
            axes = lora_axes(self.model, shapes)
            places = meshes.parameter_shardings(axes, shapes, self.mesh)
            params = jax.tree.map(_placed, shapes, places)
        state = jax.eval_shape(lambda tree: make_train_state(tree, self.tx), params)
        everywhere = meshes.replicated(self.mesh)
        moments = optax.tree_map_params(
            self.tx,
            lambda leaf, own: _placed(leaf, own.sharding),
            state.opt_state,
            params,
            transform_non_params=lambda leaf: _placed(leaf, everywhere),
        )
        step: Any = _placed(state.step, everywhere)
        return TrainState(step=step, params=params, opt_state=moments)

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        updates = self.config.steps * self.config.updates_per_step
        return make_optimizer(self.config.optimizer, total_updates=updates)

    @property
    def variables(self) -> PyTree:
        return policy_variables(self.state.params, self.base)

    @functools.cached_property
    def reference(self) -> PyTree | None:
        """Linen variables of the reference policy."""
        objective, dtype = self.config.objective, self.scorer.config.dtype
        if not objective.kl_coef:
            return None
        if self.base is None:
            return {"params": self._cast(self.whole, dtype)}
        if objective.reference_every is None:
            return {"params": self.base}
        return policy_variables(self._cast(self.state.params, dtype), self.base)

    def _cast(self, tree: PyTree, dtype: str) -> PyTree:
        cast = functools.partial(in_compute_dtype, dtype=dtype)
        shapes = jax.eval_shape(cast, tree)
        return jax.tree.map(lambda x, old: _placed(x, old.sharding), shapes, tree)

    def held(self, *, using: str = "") -> list[PyTree]:
        """What is on the devices in a phase that uses moments or the reference."""
        trees = [self.state.params, self.base]
        kept = {"optimizer": self.state.opt_state, "reference": self.reference}
        for name, tree in kept.items():
            if name not in self.config.mesh.offload or name == using:
                trees.append(tree)
        return trees

    def sampling(self, phase: str) -> Iterator[Program]:
        """The programs that sample in a rollout, or in an evaluation."""
        config, variables, held = self.config, self.variables, self.held()
        times = int(phase == "rollout")
        if self.mesh.shape["fsdp"] > 1 and config.mesh.sampler == "gathered":
            gathered = jax.tree.map(
                lambda leaf: _placed(leaf, whole_over_fsdp(leaf.sharding)),
                self._cast(variables, self.model.config.dtype),
            )
            places = jax.tree.map(lambda leaf: leaf.sharding, gathered)
            cast = functools.partial(in_compute_dtype, dtype=self.model.config.dtype)
            gather = jax.jit(cast, out_shardings=places)
            lower = functools.partial(gather.lower, variables)
            yield self._program(phase, "gather", lower, held, variables, times)
            variables, held = gathered, [*held, gathered]
        sizes: dict[str, Any] = {
            "prompts": config.prompts_per_step,
            "group_size": config.group_size,
            "sampling": config.sampling,
            "slots": config.rollout.slots,
            "streams": config.rollout.carry_over,
        }
        if phase == "evaluation":
            batch = evaluation_batch(self.config_of_model, config, self.mesh)
            sizes |= {
                "prompts": config.eval_prompts,
                "group_size": 1,
                "sampling": dataclasses.replace(config.sampling, temperature=0.0),
                "slots": batch,
                "streams": False,
            }
        model: Any = self.model
        for one in sampler_programs(
            model,
            variables,
            self.mesh,
            prompt_tokens=config.max_prompt_tokens,
            max_new_tokens=config.max_new_tokens,
            **sizes,
        ):
            weights = None if one.name in ("widen", "decode") else variables
            decodes = one.name == "decode"
            yield self._program(
                phase,
                one.name,
                one.lowered,
                [*held, one.held],
                (one.given, weights),
                times * (1 if decodes else one.turns),
                one.turns if decodes else 1,
            )

    def learning(self) -> Iterator[Program]:
        """The programs that score a rollout and learn from it."""
        config, batch = self.config, self.batch(self.config.prompts_per_step)
        scored = batch.replace(ref_logp=None, old_logp=None)
        score = jax.jit(
            functools.partial(score_batch, self.scorer, config),
            out_shardings=meshes.batch_sharding(self.mesh),
        )
        passes = []
        if self.reference is not None:
            passes.append(self.reference)
        if config.updates_per_step > 1 and not config.rollout.carry_over:
            passes.append(self.variables)
        if passes:
            held = self.held(using="reference")
            yield self._program(
                "score",
                "score",
                lambda: score.lower(passes[0], scored),
                [*held, scored],
                (passes[0], scored),
                len(passes),
            )
        part = self.batch(config.prompts_per_update)
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        make = make_train_step(self.scorer, self.tx, config)
        step = jax.jit(
            functools.partial(make, places=places.params),
            donate_argnums=0,
            out_shardings=(places, None),
        )
        held = self.held(using="optimizer")
        held += [batch] if config.minibatches == 1 else [batch, part]
        yield self._program(
            "update",
            "update",
            lambda: step.lower(self.state, part, self.base),
            held,
            (self.state, part, self.base),
            config.updates_per_step,
        )

    def batch(self, prompts: int) -> Batch:
        """A batch of prompts of full length."""
        config, rows = self.config, meshes.batch_sharding(self.mesh)
        group, length = config.group_size, config.max_new_tokens

        def of(*shape: int, dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct((prompts, *shape), dtype, sharding=rows)

        logp = functools.partial(of, group, length, dtype=jnp.float32)
        several = config.updates_per_step > 1 or config.rollout.carry_over
        carried = config.rollout.carry_over
        return Batch(
            prompts=of(config.max_prompt_tokens),
            prompt_lengths=of(),
            completions=of(group, length),
            mask=of(group, length, dtype=jnp.bool_),
            advantages=of(group, dtype=jnp.float32),
            sampler_logp=logp(),
            fresh=of(group, length, dtype=jnp.bool_) if carried else None,
            old_logp=logp() if several else None,
            ref_logp=logp() if config.objective.kl_coef else None,
        )

    def _program(
        self,
        phase: str,
        name: str,
        lower: Callable[[], Lowered],
        held: PyTree,
        uses: PyTree,
        times: int,
        turns: int = 1,
    ) -> Program:
        used = set(map(id, jax.tree.leaves(uses)))
        others = [leaf for leaf in jax.tree.leaves(held) if id(leaf) not in used]
        lower = on_mesh(self.mesh, lower)
        return Program(phase, name, lower, bytes_on_a_device(others), times, turns)


def bytes_on_a_device(tree: PyTree) -> int:
    """Bytes of one device's share of arrays, each counted once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in leaves
        if leaf.sharding is not None
    )


def _placed(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
