"""The policy of a run, restored from a checkpoint."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import PyTree

from grpo_jax.checkpointing.bucket import bucket_address, local_copy
from grpo_jax.checkpointing.checkpoints import Checkpoints, Step
from grpo_jax.config import SamplingConfig, TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, param_axes
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning.resolve import with_compute_dtype
from grpo_jax.rollout.draw import policy_sampling
from grpo_jax.training import _run_dir as directories
from grpo_jax.training._fingerprint import describe_architecture, describe_weights
from grpo_jax.training._manifest import Origin, check_data, read_data, read_manifest
from grpo_jax.training._merging import computed, merged_parameters
from grpo_jax.training._policy import load_model
from grpo_jax.weights.adapter import Adapter
from grpo_jax.weights.pretrained import load_pretrained, load_without_weights
from grpo_jax.weights.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A policy as a run left it at a step; None where there is no run."""

    params: PyTree
    model: Decoder
    config: TrainConfig
    tokenizer: Tokenizer
    step: int | None

    def sampling(
        self, *, samples: int = 1, temperature: float | None = None
    ) -> SamplingConfig:
        """How completions are drawn outside of training: with the run's cuts and ends.

        Args:
          samples: of a prompt; a single one is the likeliest by default.
          temperature: by default 0 (greedy) for one sample, else the run's.
        """
        if temperature is None and samples == 1:
            temperature = 0.0
        return policy_sampling(
            self.model.config,
            self.tokenizer,
            self.config.sampling,
            temperature=temperature,
        )


def restore(
    run_dir: str | Path, step: Step = None, mesh: Mesh | None = None
) -> Restored:
    """The parameters of a run at a step (the newest by default), on any devices.

    The step "best" is the one that `checkpoint.keep_best` of the run keeps.

    Adapters are merged into their base, which is read again from the run's model in
    the compute dtype of this machine. Relative paths of the run are looked up where it
    was started. The run's directory is not changed.

    Args:
      mesh: where the parameters go; None is the default device, whatever mesh the run
        was saved on.

    Raises:
      ValueError: if the directory holds no run or no such step, or if the model is not
        the one with which the run began.
    """
    path = local_copy(run_dir)
    origin = Origin.read(read_manifest(path))
    config, found, params = _read_trained(run_dir, path, step)
    model_config, tokenizer = load_without_weights(config.model, revision=origin.commit)
    check_data(path, {"model_config": describe_architecture(model_config)})
    if config.lora.rank is not None:
        base = load_model(config, mesh, commit=origin.commit)
        check_data(path, {"weights": describe_weights(base.params, frozen=True)})
        scaled = dataclasses.replace(base.config, lora_scale=config.lora.scale)
        params = computed(merged_parameters(base.params, params, scaled))
    model = Decoder(with_compute_dtype(model_config, config))
    if mesh is None:
        place: Any = SingleDeviceSharding(jax.local_devices()[0])
    else:
        place = meshes.parameter_shardings(param_axes(model), params, mesh)
    return Restored(
        params=jax.device_put(params, place),
        model=model,
        config=config,
        tokenizer=tokenizer.dated(origin.started),
        step=found,
    )


def restore_adapter(
    run_dir: str | Path, step: Step = None
) -> tuple[int, Adapter, ModelConfig]:
    """The adapters of a run: step, adapters, and the configuration of their base.

    Raises:
      ValueError: as `restore`, and if the run trained all weights.
    """
    path = local_copy(run_dir)
    origin = Origin.read(read_manifest(path))
    config, found, params = _read_trained(run_dir, path, step)
    if config.lora.rank is None:
        raise ValueError(
            f"the run in {run_dir} has no adapters: it trained all weights (lora.rank "
            "is null). Export the whole model."
        )
    adapter = Adapter(params=params, alpha=config.lora.alpha, base_name=config.model)
    return found, adapter, load_without_weights(config.model, revision=origin.commit)[0]


def trained_task(run_dir: str | Path) -> str | None:
    """The name of the task whose rows a run was trained on, if its manifest has it."""
    return read_data(local_copy(run_dir)).get("task")


def open_policy(
    *, run_dir: str | Path | None = None, model: str | None = None, step: Step = None
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
        model=Decoder(with_compute_dtype(loaded.config, config)),
        config=config,
        tokenizer=loaded.tokenizer,
        step=None,
    )


def _read_trained(
    run_dir: str | Path, path: Path, step: Step
) -> tuple[TrainConfig, int, PyTree]:
    """The configuration of a run, and the newest or another step, on the host.

    Args:
      path: the run's directory, or a copy of its small files.
    """
    config = directories.read_located_config(path)
    place = f"{bucket_address(run_dir) or path}/checkpoints"
    checkpoints = Checkpoints(place, config.checkpoint, read_only=True)
    found, params, _ = checkpoints.restore_params(step)
    checkpoints.close()
    return config, found, params
