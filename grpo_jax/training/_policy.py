"""The policy of a run before its first step, loaded from files onto the mesh."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from grpo_jax.config import SamplingConfig, TrainConfig
from grpo_jax.models.decoder import Decoder, abstract_params, param_axes
from grpo_jax.models.lora import init_lora, lora_axes
from grpo_jax.models.protocol import FLOAT32_PARAMS
from grpo_jax.models.quantized import QUANTIZED, abstract_quantized
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning.advice import memory_warning
from grpo_jax.planning.resolve import (
    compute_dtype,
    device_memory,
    resolve_auto,
    with_compute_dtype,
)
from grpo_jax.rollout.draw import policy_sampling
from grpo_jax.training._fingerprint import describe_architecture, describe_weights
from grpo_jax.training._manifest import Origin
from grpo_jax.training._merging import merged_parameters
from grpo_jax.weights.pretrained import Pretrained, load_pretrained
from grpo_jax.weights.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The model of a run, before its first step.

    Attributes:
      model: the decoder with the compute dtype and remat of the run.
      tokenizer: its tokenizer.
      params: what is trained: all parameters, or adapters; float32.
      config: the run's configuration, with each "auto" about memory resolved.
      warning: what to change if the run will not fit into memory; else None.
      base: the frozen parameters under adapters, in the compute dtype, or with kernels
        that are quantized; None without adapters.
      commit: of the model on the hub; None for a local model.
    """

    model: Decoder
    tokenizer: Tokenizer
    params: PyTree
    config: TrainConfig
    warning: str | None = None
    base: PyTree | None = None
    commit: str | None = None

    def merged(self, params: PyTree) -> PyTree:
        """Float32 parameters of the plain model that acts like the trained one.

        With adapters each is computed whenever it is read: `_merging.Merged`.
        """
        if self.base is None:
            return params
        return merged_parameters(self.base, params, self.model.config)

    @property
    def sampling(self) -> SamplingConfig:
        """How the run draws completions."""
        return policy_sampling(self.model.config, self.tokenizer, self.config.sampling)

    def description(self) -> dict[str, Any]:
        """What the model is before any step; all processes must call it, then."""
        frozen = self.base is not None
        return {
            "model_config": describe_architecture(self.model.config),
            "weights": describe_weights(
                self.base if frozen else self.params, frozen=frozen
            ),
        }

    def pretrained(self, params: PyTree) -> Pretrained:
        """The plain model with parameters that `merged` gave, ready to be exported."""
        config = dataclasses.replace(self.model.config, lora_scale=None)
        return Pretrained(Decoder(config), params, self.tokenizer, config)


def load_policy(
    config: TrainConfig, mesh: Mesh, origin: Origin | None = None
) -> Policy:
    """The model that `config` names; each parameter is created with its sharding.

    With `config.lora` fresh adapters are trained, and the model's parameters are their
    frozen base.

    Args:
      origin: of a run that is resumed: the model's commit, and the run's date.

    Raises:
      ValueError: if the model cannot be read or does not divide over the mesh, or if
        the adapters do not fit it.
    """
    origin = origin or Origin()
    loaded = load_model(config, mesh, commit=origin.commit)
    limit = device_memory(mesh)
    chosen = with_compute_dtype(loaded.config, config)
    chosen, config = resolve_auto(chosen, config, mesh, limit=limit)
    model, params, base = Decoder(chosen), loaded.params, None
    if (rank := config.lora.rank) is not None:
        model = Decoder(dataclasses.replace(chosen, lora_scale=config.lora.scale))
        init = functools.partial(
            init_lora, model, rank=rank, targets=config.lora.targets
        )
        # Rollouts fold their step into the same key, from 1 on.
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        shapes = jax.eval_shape(init, key)
        places = meshes.parameter_shardings(lora_axes(model, shapes), shapes, mesh)
        params, base = jax.jit(init, out_shardings=places)(key), loaded.params
    return Policy(
        model=model,
        tokenizer=loaded.tokenizer.dated(origin.started),
        params=params,
        config=config,
        warning=memory_warning(chosen, config, mesh, limit=limit),
        base=base,
        commit=loaded.commit,
    )


def load_model(
    config: TrainConfig, mesh: Mesh | None, *, commit: str | None
) -> Pretrained:
    """The model of a run: master parameters, or a base that stays as it is."""
    kind = config.lora.quantized

    def dtype(path: str) -> str:
        if kind is not None and QUANTIZED.fullmatch(path):
            return kind
        whole = config.lora.rank is None or path.split("/")[-1] in FLOAT32_PARAMS
        return "float32" if whole else compute_dtype(config)

    if mesh is None:
        return load_pretrained(config.model, revision=commit, dtype=dtype)

    def place(model: Decoder) -> PyTree:
        shapes = abstract_params(model)
        places = meshes.parameter_shardings(param_axes(model), shapes, mesh)
        stored = abstract_quantized(shapes, places, kind)
        return jax.tree.map(lambda leaf: leaf.sharding, stored)

    return load_pretrained(config.model, revision=commit, dtype=dtype, sharding=place)
