"""How much memory each device needs, before anything is loaded or compiled.

Sizes of arrays that stay are exact. Activations kept for the backward pass are counted
by tracing the model on the shapes of one device. The compiler adds and saves more by
fused operations, buffers of collectives and fragments: see `Estimate`.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import PyTree

from grpo_jax.config import TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params, param_axes
from grpo_jax.models.limits import cache_columns, prompt_rows
from grpo_jax.models.lora import init_lora, lora_axes
from grpo_jax.models.protocol import in_compute_dtype
from grpo_jax.models.quantized import abstract_quantized
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.collectives import moves_head
from grpo_jax.planning._bytes import share_bytes, whole_bytes
from grpo_jax.planning._kept import kept_bytes
from grpo_jax.planning._programs import Program, evaluation_program, training_programs

# Tokens whose logits are held at once; the default of `objective.chunked_logprobs`.
_CHUNK = 1024
# Arrays of one chunk's logits that exist at the same time. In the backward pass they
# are the recomputed logits, their softmax and their gradient.
_CHUNK_ARRAYS = 3
# Arrays of the sampler's logits: logits, softmax and its running sum.
_SAMPLER_ARRAYS = 3


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on one device, by purpose.

    The phases of a step follow one another: rollout, score, update, and at times an
    evaluation. A phase is within a factor of two of what XLA reports when it compiles
    the program for CPU; updates are closer.

    Attributes:
      always: held all the time.
      phases: what each phase of the run holds in addition.
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
    """The memory that a run needs on each device of a mesh, which may be abstract.

    `model` has the compute dtype and remat of the run. A sampler of "auto" counts as
    "gathered".

    Raises:
      ValueError: if the model does not divide over the mesh, or adapters do not fit it.
    """
    run = _Sizes(model, config, mesh)
    made = _training(run)
    if not is_evaluated(config):
        return made
    batch = evaluation_batch(model, config, mesh)
    program = evaluation_program(batch, of=config.eval_prompts)
    sizes = _positive(run.holds(program))
    return Estimate(made.always, {**made.phases, program.phase: sizes})


def is_evaluated(config: TrainConfig) -> bool:
    """Whether a run evaluates its policy, if there are held-out rows."""
    return bool(config.eval_every and config.eval_prompts)


def evaluation_batch(
    model: ModelConfig, config: TrainConfig, mesh: Mesh | AbstractMesh
) -> int:
    """The number of held-out prompts that an evaluation completes at once, in total.

    By default it is the number of sequences of a rollout. It is halved until the
    evaluation needs no more memory than the rest of the run.
    """
    if config.eval_batch_size is not None:
        return min(config.eval_batch_size, config.eval_prompts)
    run = _Sizes(model, config, mesh)
    most = sum(run.holds(next(training_programs(config))).values())
    batch = min(config.prompts_per_step * config.group_size, config.eval_prompts)
    peak = functools.cache(lambda: _training(run))

    def fits() -> bool:
        program = evaluation_program(batch, of=config.eval_prompts)
        size = sum(run.holds(program).values())
        # The rollout is tried first, because finding the peak traces the model.
        return size <= most or size + sum(peak().always.values()) <= peak().peak

    while batch > meshes.batch_shards(mesh) and not fits():
        batch = -(-batch // 2)
    return batch


def _training(run: "_Sizes") -> Estimate:
    """The memory of the steps of a run."""
    kept = {"optimizer moments": 2 * run.trained, "reference": run.reference}
    used_in = {"optimizer moments": "update", "reference": "score"}
    phases = {one.phase: run.holds(one) for one in training_programs(run.config)}
    always = {"parameters": run.parameters, **run.carried}
    for name, size in kept.items():
        # Offloaded arrays are on the device only in the phase that uses them.
        on_host = name.removesuffix(" moments") in run.config.mesh.offload
        (phases[used_in[name]] if on_host else always)[name] = size
    return Estimate(_positive(always), {k: _positive(v) for k, v in phases.items()})


def activation_bytes(
    model: ModelConfig, config: TrainConfig, mesh: Mesh | AbstractMesh
) -> int:
    """Bytes of activations on one device that a microbatch keeps for its backward pass.

    They depend on `model.remat`.
    """
    return _Sizes(model, config, mesh).kept(model.remat)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """The terms of an estimate, in bytes on one device."""

    model: ModelConfig
    config: TrainConfig
    mesh: Mesh | AbstractMesh

    @functools.cached_property
    def _places(self) -> tuple[PyTree, PyTree]:
        model = dataclasses.replace(self.model, dtype="float32", remat="none")
        shapes, axes = abstract_params(Decoder(model)), param_axes(Decoder(model))
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
        """The trained parameters, float32."""
        return share_bytes(*(self._adapters or self._places), dtype="float32")

    @functools.cached_property
    def _compute(self) -> int:
        return share_bytes(*self._places, dtype=self.model.dtype)

    @functools.cached_property
    def _base(self) -> tuple[PyTree, PyTree]:
        """The frozen base of adapters, as it is stored."""
        stored = abstract_quantized(*self._places, self.config.lora.quantized)
        cast = functools.partial(in_compute_dtype, dtype=self.model.dtype)
        places = jax.tree.map(lambda leaf: leaf.sharding, stored)
        return jax.eval_shape(cast, stored), places

    @property
    def parameters(self) -> int:
        """The trained parameters, and the frozen base of adapters."""
        base = 0 if self._adapters is None else share_bytes(*self._base)
        return self.trained + base

    @property
    def dequantized(self) -> int:
        """The kernels of a layer in the compute dtype, if they are quantized."""
        return self._one_layer if self.config.lora.quantized else 0

    @property
    def reference(self) -> int:
        """The frozen reference; adapters use their base instead."""
        if not self.config.objective.kl_coef:
            return 0
        if self._adapters is None:
            return self._compute
        renewed = self.config.objective.reference_every is not None
        return share_bytes(*self._adapters, dtype=self.model.dtype) if renewed else 0

    @property
    def microbatches(self) -> int:
        """Parts into which an update is cut."""
        sequences = self.config.prompts_per_update * self.config.group_size
        return sequences // min(self.config.microbatch_size or sequences, sequences)

    @property
    def _gradients(self) -> int:
        """How many gradients an update holds at the same time."""
        # A sum and that of a microbatch. What the compiler for TPUs reserves beyond its
        # arrays is about one more: fitted to two programs, not read from its heap.
        most = 3 if self._on_tpu else 2
        return most if self.microbatches > 1 else 1

    @property
    def _on_tpu(self) -> bool:
        device = meshes.device_of(self.mesh)
        return device is not None and device.device_kind.startswith("TPU")

    @property
    def _microbatch(self) -> tuple[int, int]:
        """Prompts on one device, and completions of each, that are held at once."""
        size, group = self.config.microbatch_size, self.config.group_size
        prompts = self.config.prompts_per_update
        if size is not None:
            prompts, group = max(size // group, 1), min(size, group)
        return -(-prompts // meshes.batch_shards(self.mesh)), group

    def kept(self, remat: str) -> int:
        """Activations of a microbatch that are kept for its backward pass."""
        prompts, group = self._microbatch
        tensor = self.mesh.shape["tensor"]
        part = dataclasses.replace(
            self.model,
            remat=remat,
            num_heads=-(-self.model.num_heads // tensor),
            num_kv_heads=-(-self.model.num_kv_heads // tensor),
            intermediate_size=-(-self.model.intermediate_size // tensor),
            mixer=self.model.mixer and self.model.mixer.of_device(tensor),
        )
        kept = kept_bytes(
            part,
            prompts,
            group,
            self.config.max_prompt_tokens,
            self.config.max_new_tokens,
            meshes.device_of(self.mesh),
        )
        # Without remat the kernels are kept as they were rounded for the products. For
        # TPUs XLA rounds all of them before the loop over layers.
        rounded = self.model.dtype != "float32" and (remat == "none" or self._on_tpu)
        return kept + (self._compute if rounded and self._adapters is None else 0)

    @functools.cached_property
    def layer(self) -> int:
        """The bytes of one layer of a microbatch while it is computed."""
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
        return whole_bytes(*layers, dtype=self.model.dtype) // self.model.num_layers

    @property
    def _head(self) -> int:
        """The head, gathered over fsdp."""
        vocabulary = -(-self.model.vocab_size // self.mesh.shape["tensor"])
        return self.item * self.model.hidden_size * vocabulary

    @property
    def item(self) -> int:
        """Bytes of a number in the compute dtype."""
        return jnp.dtype(self.model.dtype).itemsize

    @property
    def _moved_layer(self) -> int:
        return self._one_layer if self.mesh.shape["fsdp"] > 1 else 0

    def _moved_at_head(self, *, gradient: bool) -> int:
        """Gathered over fsdp: hidden states (scoring chunks a copy), or the head."""
        fsdp, tensor = self.mesh.shape["fsdp"], self.mesh.shape["tensor"]
        if fsdp == 1:
            return 0
        if moves_head(self.model.vocab_size, fsdp=fsdp, tensor=tensor):
            # The gradient of the head is summed in float32.
            return self._head + (self._head * 4 // self.item if gradient else 0)
        hidden = self.item * self.model.hidden_size * self._tokens * fsdp
        return hidden if gradient else 2 * hidden

    def holds(self, program: Program) -> dict[str, int]:
        """The bytes that a program holds in addition to those that are always held."""
        if program.function == "advance":
            sizes = self._sampling(program)
            kept = self.carried if program.phase == "rollout" else {}
            return {name: size for name, size in sizes.items() if name not in kept}
        if program.phase == "score":
            return max(self._scoring, key=lambda sizes: sum(sizes.values()))
        return {
            "gradients": self.trained * self._gradients,
            "activations": self.kept(self.model.remat) + self.layer,
            "log-prob chunks": self.chunks(_CHUNK_ARRAYS),
            "dequantized kernels": self.dequantized,
            "moved over fsdp": self._moved_layer + self._moved_at_head(gradient=True),
        }

    @property
    def _scoring(self) -> tuple[dict[str, int], ...]:
        """What a scoring pass holds first, in its layers, and then, at the head."""
        head = self._moved_at_head(gradient=False)
        return {
            # Without a gradient an array is freed once the next one is computed.
            "activations": self.layer // 4,
            "dequantized kernels": self.dequantized,
            "moved over fsdp": self._moved_layer,
        }, {"log-prob chunks": self.chunks(1), "moved over fsdp": head}

    @property
    def carried(self) -> dict[str, int]:
        """What the sampler keeps between the rollouts, with carry_over."""
        if not self.config.rollout.carry_over:
            return {}
        sizes = self._sampling(next(training_programs(self.config)))
        names = "prompts' keys and values", "own keys and values", "states"
        return {name: sizes[name] for name in names}

    def _sampling(self, program: Program) -> dict[str, int]:
        """The bytes that sampling holds, from the prompts to the last token."""
        model, config, mesh = self.model, self.config, self.mesh
        fsdp = mesh.shape["fsdp"] > 1
        split = fsdp and config.mesh.sampler == "split"
        cast = 0 if model.dtype == "float32" or self._adapters else self._compute
        embed = self._head if cast and not fsdp else 0
        copied = 0 if self.dequantized else self._one_layer * model.num_layers
        heads = -(-model.num_kv_heads // mesh.shape["tensor"])
        own = model.mixer and model.mixer.of_device(mesh.shape["tensor"])
        state = own.state_bytes(self.item) if own else 0
        entry = 2 * self.item * model.attention_layers * heads * model.head_dim
        shards = meshes.batch_shards(mesh)
        sequences, prompts = -(-program.slots // shards), -(-program.prompts // shards)
        # As many prompts as that are computed at once: see `rollout._engine`.
        at_once = 1 << (prompts - 1).bit_length()
        vocabulary = -(-model.vocab_size // mesh.shape["tensor"])
        columns = cache_columns(config.max_new_tokens, config.max_new_tokens)
        # While the ring grows to all columns, the half of them is there as well.
        half = cache_columns(config.max_new_tokens, -(-columns // 2))
        half = half if half < columns else 0
        gathered = 0
        if fsdp and not split:  # all parameters as they are used, adapters too
            gathered = whole_bytes(*self._base)
            if self._adapters is not None:
                gathered += whole_bytes(*self._adapters, dtype=model.dtype)
        # Attention scores, float32 with their softmax, and the MLP of one layer over
        # prompts of full length.
        length, tensor = config.max_prompt_tokens, mesh.shape["tensor"]
        inner = -(-model.intermediate_size // tensor)
        scores = 2 * 4 * -(-model.num_heads // tensor) * length
        hidden = self.item * (2 * inner + 4 * model.hidden_size)
        sizes = {
            "sampler's parameters": gathered,
            # Copies by layer, transposed, which decoding reads faster; of parameters
            # that are not rounded yet also the embedding. Codes stay stacked.
            "kernels": cast if split else copied + embed,
            "dequantized kernels": self.dequantized,
            # A split sampler gathers embedding and head before the loop over tokens,
            # and one layer at a time within it.
            "moved over fsdp": self._one_layer + 2 * self._head if split else 0,
            # The transposed head; a tied embedding has this layout already.
            "head": 0 if model.tie_embeddings else self._head,
            "prompts' keys and values": prompt_rows(prompts) * length * entry,
            "own keys and values": sequences * columns * entry,
            "a ring that grows": sequences * half * entry,
            "states": (prompt_rows(prompts) + sequences) * state,
            "logits": 4 * _SAMPLER_ARRAYS * sequences * vocabulary,
            "activations": at_once * length * (scores + hidden),
        }
        if self._on_tpu:  # as compiled, all that is gathered is then laid out anew
            sizes["gathers"] = max(2 * gathered - sum(sizes.values()), 0)
        return sizes


def _positive(sizes: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if size}
