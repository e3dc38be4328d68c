"""The policy of a run: loaded from files onto the mesh, or from a checkpoint."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import PyTree

from grpo_jax.checkpointing.checkpoints import Checkpoints, Step
from grpo_jax.config import SamplingConfig, TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params, param_axes
from grpo_jax.models.lora import init_lora, lora_axes, merge_lora
from grpo_jax.models.protocol import FLOAT32_PARAMS
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning.advice import memory_warning
from grpo_jax.planning.resolve import (
    compute_dtype,
    device_memory,
    resolve_auto,
    with_compute_dtype,
)
from grpo_jax.rollout.draw import policy_sampling
from grpo_jax.training import _run_dir as directories
from grpo_jax.training._fingerprint import describe_architecture, describe_weights
from grpo_jax.training._manifest import Origin, check_data, read_data, read_manifest
from grpo_jax.weights.adapter import Adapter
from grpo_jax.weights.pretrained import (
    Pretrained,
    load_pretrained,
    load_without_weights,
)
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
      base: the frozen parameters under adapters, in the compute dtype; None without
        adapters.
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
        """Float32 parameters of the plain model that acts like the trained one."""
        if self.base is None:
            return params
        return _merge(self.base, params, self.model.config)

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
    loaded = _load(config, mesh, commit=origin.commit)
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
    path = Path(run_dir)
    origin = Origin.read(read_manifest(path))
    config, found, params = _read_trained(path, step)
    model_config, tokenizer = load_without_weights(config.model, revision=origin.commit)
    check_data(path, {"model_config": describe_architecture(model_config)})
    if config.lora.rank is not None:
        base = _load(config, mesh, commit=origin.commit)
        check_data(path, {"weights": describe_weights(base.params, frozen=True)})
        scaled = dataclasses.replace(base.config, lora_scale=config.lora.scale)
        params = _merge(base.params, params, scaled)
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
    origin = Origin.read(read_manifest(Path(run_dir)))
    config, found, params = _read_trained(Path(run_dir), step)
    if config.lora.rank is None:
        raise ValueError(
            f"the run in {run_dir} has no adapters: it trained all weights (lora.rank "
            "is null). Export the whole model."
        )
    adapter = Adapter(params=params, alpha=config.lora.alpha, base_name=config.model)
    return found, adapter, load_without_weights(config.model, revision=origin.commit)[0]


def trained_task(run_dir: Path) -> str | None:
    """The name of the task whose rows a run was trained on, if its manifest has it."""
    return read_data(run_dir).get("task")


def open_policy(
    *, run_dir: Path | None = None, model: str | None = None, step: Step = None
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


def _read_trained(path: Path, step: Step) -> tuple[TrainConfig, int, PyTree]:
    """The configuration of a run, and the newest or another step, on the host."""
    config = directories.read_located_config(path)
    checkpoints = Checkpoints(path / "checkpoints", config.checkpoint, read_only=True)
    found, params, _ = checkpoints.restore_params(step)
    checkpoints.close()
    return config, found, params


def _load(config: TrainConfig, mesh: Mesh | None, *, commit: str | None) -> Pretrained:
    """The model of a run: master parameters, or a base that stays as it is."""

    def dtype(path: str) -> str:
        whole = config.lora.rank is None or path.split("/")[-1] in FLOAT32_PARAMS
        return "float32" if whole else compute_dtype(config)

    if mesh is None:
        return load_pretrained(config.model, revision=commit, dtype=dtype)

    def place(model: Decoder) -> PyTree:
        return meshes.parameter_shardings(
            param_axes(model), abstract_params(model), mesh
        )

    return load_pretrained(config.model, revision=commit, dtype=dtype, sharding=place)


def _merge(base: PyTree, params: PyTree, config: ModelConfig) -> PyTree:
    """Base and adapters as plain parameters, with the shardings of the base."""
    places = jax.tree.map(lambda leaf: leaf.sharding, base)
    merge = functools.partial(merge_lora, config=config)
    return jax.jit(merge, out_shardings=places)(base, params)
