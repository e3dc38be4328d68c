"""How much memory each device needs, before anything is loaded or compiled.

Sizes of arrays that stay are exact; what the backward pass keeps is counted by tracing
the model on the shapes of one device. What a compiler adds or saves on top (fused
operations, buffers of collectives, fragments) is not known here: see `Estimate`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import PyTree

from grpo_jax.config import TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params, param_axes
from grpo_jax.models.lora import init_lora, lora_axes
from grpo_jax.models.protocol import in_compute_dtype
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.collectives import moves_head, whole_over_fsdp
from grpo_jax.planning.programs import (
    Program,
    evaluation_program,
    is_evaluated,
    training_programs,
)

# Tokens whose logits are held at once, of `objective.chunked_logprobs`.
_CHUNK = 1024
# Arrays of one chunk's logits that live at the same time: forward, and in the backward
# pass the logits made again, their softmax and their gradient.
_CHUNK_ARRAYS = 3
# Arrays of the sampler's logits: with their softmax, its running sum, the choice.
_SAMPLER_ARRAYS = 3


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on one device, by what they are for.

    The phases of a step follow one another: rollout, score and update; an evaluation
    comes now and then. Within a factor of two a phase is what XLA asks for when it
    compiles the program for CPU; updates come closer.

    Attributes:
      always: held all the time.
      phases: what each phase that the run has holds besides.
    """

    always: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    def total(self, phase: str) -> int:
        """All bytes of a phase."""
        return sum(self.always.values()) + sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        """The bytes of the phase that needs most."""
        return max(map(self.total, self.phases))


def estimate(
    model: ModelConfig, config: TrainConfig, mesh: Mesh | AbstractMesh
) -> Estimate:
    """The memory that a run needs on each device of a mesh, real or imagined.

    `model` has the compute dtype and remat of the run. A sampler of "auto" counts as
    "gathered".

    Raises:
      ValueError: if the model does not divide over the mesh, or adapters do not fit it.
    """
    run = _Run(model, config, mesh)
    made = _training(run)
    if not is_evaluated(config):
        return made
    program = evaluation_program(evaluation_batch(model, config, mesh))
    sizes = _positive(run.holds(program))
    return Estimate(made.always, {**made.phases, program.phase: sizes})


def evaluation_batch(
    model: ModelConfig, config: TrainConfig, mesh: Mesh | AbstractMesh
) -> int:
    """How many held-out prompts an evaluation completes at once, over all devices.

    By default as many as a rollout has sequences, or half of them, and so on, until
    the evaluation needs no more memory than the rest of the run.
    """
    if config.eval_batch_size is not None:
        return min(config.eval_batch_size, config.eval_prompts)
    run = _Run(model, config, mesh)
    most = sum(run.holds(next(training_programs(config))).values())
    batch = min(config.prompts_per_step * config.group_size, config.eval_prompts)
    peak = functools.cache(lambda: _training(run))

    def fits() -> bool:
        size = sum(run.holds(evaluation_program(batch)).values())
        # The peak takes time to find, and a rollout is often enough.
        return size <= most or size + sum(peak().always.values()) <= peak().peak

    while batch > meshes.batch_shards(mesh) and not fits():
        batch = -(-batch // 2)
    return batch


def _training(run: "_Run") -> Estimate:
    """The memory of the steps of a run."""
    always = {"parameters": run.parameters}
    moments, reference = 2 * run.trained, run.reference
    on_host = run.config.mesh.offload
    if "optimizer" not in on_host:
        always["optimizer moments"] = moments
    if "reference" not in on_host:
        always["reference"] = reference
    phases = {one.phase: run.holds(one) for one in training_programs(run.config)}
    if "optimizer" in on_host:
        phases["update"]["optimizer moments"] = moments
    if "reference" in on_host:
        phases["score"]["reference"] = reference
    return Estimate(_positive(always), {k: _positive(v) for k, v in phases.items()})


def activation_bytes(
    model: ModelConfig, config: TrainConfig, mesh: Mesh | AbstractMesh
) -> int:
    """Bytes on one device that the backward pass of a microbatch keeps of its forward.

    They depend on `model.remat`.
    """
    return _Run(model, config, mesh).kept(model.remat)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The sizes that an estimate is made of, in bytes on one device."""

    model: ModelConfig
    config: TrainConfig
    mesh: Mesh | AbstractMesh

    @functools.cached_property
    def _places(self) -> tuple[PyTree, PyTree]:
        shapes, axes = _parameters(
            dataclasses.replace(self.model, dtype="float32", remat="none")
        )
        return shapes, meshes.parameter_shardings(axes, shapes, self.mesh)

    @functools.cached_property
    def _adapters(self) -> tuple[PyTree, PyTree] | None:
        lora = self.config.lora
        if lora.rank is None:
            return None
        model, rank = Decoder(self.model), lora.rank
        shapes = jax.eval_shape(
            lambda key: init_lora(model, key, rank=rank, targets=lora.targets),
            jax.random.key(0),
        )
        axes = lora_axes(model, shapes)
        return shapes, meshes.parameter_shardings(axes, shapes, self.mesh)

    @functools.cached_property
    def trained(self) -> int:
        """What is trained, float32."""
        return _bytes(*(self._adapters or self._places), dtype="float32")

    @functools.cached_property
    def _compute(self) -> int:
        return _bytes(*self._places, dtype=self.model.dtype)

    @property
    def parameters(self) -> int:
        """What is trained, and the base of adapters."""
        return self.trained + (0 if self._adapters is None else self._compute)

    @property
    def reference(self) -> int:
        """The frozen copy; adapters have their base for it."""
        if not self.config.objective.kl_coef:
            return 0
        if self._adapters is None:
            return self._compute
        renewed = self.config.objective.reference_every is not None
        return _bytes(*self._adapters, dtype=self.model.dtype) if renewed else 0

    @property
    def microbatches(self) -> int:
        """Parts into which an update is cut."""
        sequences = self._update_prompts * self.config.group_size
        return sequences // min(self.config.microbatch_size or sequences, sequences)

    @property
    def _update_prompts(self) -> int:
        return self.config.prompts_per_step // self.config.minibatches

    @property
    def _microbatch(self) -> tuple[int, int]:
        """Prompts on one device, and completions of each, that are held at once."""
        size, group = self.config.microbatch_size, self.config.group_size
        prompts = self._update_prompts
        if size is not None:
            prompts, group = max(size // group, 1), min(size, group)
        return -(-prompts // meshes.batch_shards(self.mesh)), group

    def kept(self, remat: str) -> int:
        """What the backward pass of a microbatch needs of its forward pass."""
        prompts, group = self._microbatch
        tensor = self.mesh.shape["tensor"]
        part = dataclasses.replace(
            self.model,
            remat=remat,
            num_heads=-(-self.model.num_heads // tensor),
            num_kv_heads=-(-self.model.num_kv_heads // tensor),
            intermediate_size=-(-self.model.intermediate_size // tensor),
        )
        kept = _kept_bytes(
            part,
            prompts,
            group,
            self.config.max_prompt_tokens,
            self.config.max_new_tokens,
        )
        # Without remat the kernels are kept as they were rounded for the products.
        rounded = remat == "none" and self.model.dtype != "float32"
        return kept + (self._compute if rounded and self._adapters is None else 0)

    @functools.cached_property
    def layer(self) -> int:
        """What one layer of a microbatch holds while it is computed."""
        return self.kept("none") // self.model.num_layers

    @property
    def _tokens(self) -> int:
        """Completion tokens of a microbatch on one device."""
        prompts, group = self._microbatch
        return prompts * group * self.config.max_new_tokens

    def chunks(self, arrays: int) -> int:
        """Logits of one chunk of tokens, float32."""
        shards = meshes.batch_shards(self.mesh)
        rows = -(-min(_CHUNK, self._tokens * shards) // shards)
        vocabulary = -(-self.model.vocab_size // self.mesh.shape["tensor"])
        return 4 * arrays * rows * vocabulary

    @functools.cached_property
    def _one_layer(self) -> int:
        """The weights of a layer, gathered over fsdp."""
        layers = (tree["layers"] for tree in self._places)
        return _whole_bytes(*layers, dtype=self.model.dtype) // self.model.num_layers

    @property
    def _head(self) -> int:
        """The head, gathered over fsdp."""
        vocabulary = -(-self.model.vocab_size // self.mesh.shape["tensor"])
        return self.item * self.model.hidden_size * vocabulary

    @property
    def item(self) -> int:
        """Bytes of a number in the compute dtype."""
        return jnp.dtype(self.model.dtype).itemsize

    def moved(self, *, gradient: bool) -> int:
        """What comes over fsdp: a layer's weights, and hidden states or the head."""
        fsdp, tensor = self.mesh.shape["fsdp"], self.mesh.shape["tensor"]
        if fsdp == 1:
            return 0
        tokens = self._tokens * fsdp
        if moves_head(tokens, self.model.vocab_size, fsdp=fsdp, tensor=tensor):
            # The gradient of the head is summed in float32.
            more = self._head * 4 // self.item if gradient else 0
            return self._one_layer + self._head + more
        return self._one_layer + self.item * self.model.hidden_size * tokens

    def holds(self, program: Program) -> dict[str, int]:
        """What a program holds besides what is always there."""
        if program.function == "_generate":
            return self._sampling(program)
        if program.phase == "score":
            return {
                # Without a gradient an array is gone as soon as the next one is made.
                "activations": self.layer // 4,
                "log-prob chunks": self.chunks(1),
                "moved over fsdp": self.moved(gradient=False),
            }
        return {
            "gradients": self.trained * (2 if self.microbatches > 1 else 1),
            "activations": self.kept(self.model.remat) + self.layer,
            "log-prob chunks": self.chunks(_CHUNK_ARRAYS),
            "moved over fsdp": self.moved(gradient=True),
        }

    def _sampling(self, program: Program) -> dict[str, int]:
        """What sampling holds, from the prompts to the last token."""
        model, config, mesh = self.model, self.config, self.mesh
        fsdp = mesh.shape["fsdp"] > 1
        split = fsdp and config.mesh.sampler == "split"
        cast = 0 if model.dtype == "float32" or self._adapters else self._compute
        heads = -(-model.num_kv_heads // mesh.shape["tensor"])
        entry = 2 * self.item * model.num_layers * heads * model.head_dim
        prompts = -(-program.prompts // meshes.batch_shards(mesh))
        sequences = prompts * program.completions
        vocabulary = -(-model.vocab_size // mesh.shape["tensor"])
        # A split sampler gathers embedding and head before the loop, layers within.
        moved = self._one_layer + 2 * self._head if split else 0
        # The embedding lies by rows already.
        turned = 0 if model.tie_embeddings else self._head
        return {
            "sampler's parameters": self._gathered if fsdp and not split else 0,
            # By layer and row, which the loop over tokens reads faster.
            "kernels": cast if split else self._one_layer * model.num_layers,
            "moved over fsdp": moved,
            "head": turned,
            "prompts' keys and values": prompts * config.max_prompt_tokens * entry,
            "own keys and values": sequences * config.max_new_tokens * entry,
            "logits": 4 * _SAMPLER_ARRAYS * sequences * vocabulary,
            "activations": self._prefill(prompts),
        }

    @property
    def _gathered(self) -> int:
        """All parameters in the compute dtype, gathered over fsdp."""
        whole = _whole_bytes(*self._places, dtype=self.model.dtype)
        if self._adapters is None:
            return whole
        return whole + _whole_bytes(*self._adapters, dtype=self.model.dtype)

    def _prefill(self, prompts: int) -> int:
        """Attention scores and MLP of one layer over prompts of full length."""
        model, tensor = self.model, self.mesh.shape["tensor"]
        length = self.config.max_prompt_tokens
        heads = -(-model.num_heads // tensor)
        inner = -(-model.intermediate_size // tensor)
        scores = 2 * 4 * heads * length  # float32, with their softmax
        wide = self.item * (2 * inner + 4 * model.hidden_size)
        return prompts * length * (scores + wide)


@functools.lru_cache(maxsize=8)
def _parameters(model: ModelConfig) -> tuple[PyTree, PyTree]:
    """Shapes and logical axes of the parameters."""
    decoder = Decoder(model)
    return abstract_params(decoder), param_axes(decoder)


@functools.lru_cache(maxsize=64)
def _kept_bytes(
    model: ModelConfig, prompts: int, group: int, prompt_tokens: int, new_tokens: int
) -> int:
    """Bytes that the gradient of `Decoder.score` keeps beside its inputs."""
    decoder = Decoder(model)
    params = jax.eval_shape(
        lambda tree: in_compute_dtype(tree, model.dtype), abstract_params(decoder)
    )

    def residuals(params: PyTree, *rows: Any) -> Any:
        score = lambda p: decoder.apply({"params": p}, *rows, method=decoder.score)  # noqa: E731
        return jax.vjp(score, params)[1]

    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    shapes = [(prompts, prompt_tokens), (prompts,), (prompts, group, new_tokens)]
    jaxpr = jax.make_jaxpr(residuals)(params, *map(int32, shapes)).jaxpr
    inputs = set(jaxpr.invars)
    made = {v for v in jaxpr.outvars if isinstance(v, Var) and v not in inputs}
    arrays: list[Any] = [v.aval for v in made]
    return sum(array.size * array.dtype.itemsize for array in arrays)


def _bytes(shapes: PyTree, places: PyTree, *, dtype: str) -> int:
    """Bytes of one device's share of the arrays in a dtype."""
    parts = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)), shapes, places
    )
    return sum(jax.tree.leaves(parts)) * jnp.dtype(dtype).itemsize


def _whole_bytes(shapes: PyTree, places: PyTree, *, dtype: str) -> int:
    """The same when they are gathered over fsdp."""
    return _bytes(shapes, jax.tree.map(whole_over_fsdp, places), dtype=dtype)


def _positive(sizes: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if size}
