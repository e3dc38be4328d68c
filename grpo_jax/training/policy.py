"""The policy of a run: loaded from files onto the mesh, or from a checkpoint."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import PyTree

from grpo_jax.config import TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params, param_axes
from grpo_jax.parallel import mesh as meshes
from grpo_jax.training import run_dir as directories
from grpo_jax.training.checkpoint import Checkpoints
from grpo_jax.weights.pretrained import Pretrained, load_pretrained
from grpo_jax.weights.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is trained, and what it stands on.

    Attributes:
      model: the decoder with the compute dtype and remat of the run.
      tokenizer: its tokenizer.
      trained: the parameters that are trained: all of them, or adapters.
      base: the frozen parameters under adapters; None without adapters.
    """

    model: Decoder
    tokenizer: Tokenizer
    trained: PyTree
    base: PyTree | None = None

    def merged(self, trained: PyTree) -> PyTree:
        """Parameters of the plain model that acts like the trained one."""
        return trained

    def pretrained(self, trained: PyTree) -> Pretrained:
        """The trained model, ready to be exported."""
        return Pretrained(
            model=self.model,
            params=self.merged(trained),
            tokenizer=self.tokenizer,
            config=self.model.config,
        )


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A policy as a run left it at a step; None where there is no run."""

    params: PyTree
    model: Decoder
    config: TrainConfig
    tokenizer: Tokenizer
    step: int | None


def load_policy(config: TrainConfig, mesh: Mesh) -> Policy:
    """The model that `config` names, each parameter born where the mesh wants it.

    Raises:
      ValueError: if the model cannot be read or does not divide over the mesh.
    """

    def place(model: Decoder) -> PyTree:
        return meshes.parameter_shardings(
            param_axes(model), abstract_params(model), mesh
        )

    loaded = load_pretrained(config.model, sharding=place)
    return Policy(
        model=Decoder(for_run(loaded.config, config)),
        tokenizer=loaded.tokenizer,
        trained=loaded.params,
    )


def for_run(model: ModelConfig, config: TrainConfig) -> ModelConfig:
    """The model's configuration with the compute dtype and remat of a run."""
    dtype = config.compute_dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    remat = config.remat
    if remat == "auto":
        remat = "layer" if _activation_bytes(model, config) > 2**31 else "none"
    return dataclasses.replace(model, dtype=dtype, remat=remat)


def restore(
    run_dir: str | Path, step: int | None = None, mesh: Mesh | None = None
) -> Restored:
    """The parameters of a run at a step (the newest by default), on any devices.

    Args:
      mesh: where the parameters go; None is the default device, whatever mesh the run
        was saved on.

    Raises:
      ValueError: if the directory holds no run or no such step.
    """
    path = Path(run_dir)
    config = directories.read_config(path)
    checkpoints = Checkpoints(path / "checkpoints", config.checkpoint)
    found, params, _ = checkpoints.restore_params(step)
    checkpoints.close()
    loaded = load_pretrained(config.model)
    model = Decoder(for_run(loaded.config, config))
    if mesh is None:
        place: Any = SingleDeviceSharding(jax.devices()[0])
    else:
        place = meshes.parameter_shardings(param_axes(model), params, mesh)
    return Restored(
        params=jax.device_put(params, place),
        model=model,
        config=config,
        tokenizer=loaded.tokenizer,
        step=found,
    )


def open_policy(
    *, run_dir: Path | None = None, model: str | None = None, step: int | None = None
) -> Restored:
    """The policy of a run, or of a model that was not trained here.

    Raises:
      ValueError: unless exactly one of `run_dir` and `model` is given.
    """
    if (run_dir is None) == (model is None):
        raise ValueError("give either --run-dir or --model.")
    if run_dir is not None:
        return restore(run_dir, step)
    config = TrainConfig(model=str(model))
    loaded = load_pretrained(config.model)
    return Restored(
        params=loaded.params,
        model=Decoder(for_run(loaded.config, config)),
        config=config,
        tokenizer=loaded.tokenizer,
        step=None,
    )


def _activation_bytes(model: ModelConfig, config: TrainConfig) -> int:
    """Bytes that the backward pass of a microbatch keeps without remat, roughly."""
    sequences = config.microbatch_size or config.prompts_per_step * config.group_size
    tokens = sequences * config.max_new_tokens
    # A part of a group holds the whole prompt.
    tokens += -(-sequences // config.group_size) * config.max_prompt_tokens
    width = 12 * model.hidden_size + 4 * model.intermediate_size
    return int(np.prod([tokens, width, model.num_layers, 4], dtype=np.int64))
