"""Saves adapters as folders of PEFT, and loads such folders.

Files: adapter_config.json and adapter_model.safetensors, with one pair of tensors per
layer and projection. https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import dataclasses
import json
import logging
import operator
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from grpo_jax.config.files import write_json
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.lora import PATHS, adaptable
from grpo_jax.parallel.mesh import named_leaves
from grpo_jax.weights import _safetensors
from grpo_jax.weights._adapter_names import adapter_table, fused_modules, target_modules
from grpo_jax.weights._names import (
    Parameter,
    Tensor,
    check_tensors,
    read_parameter,
    table_tensors,
)
from grpo_jax.weights.folder import replaced_folder
from grpo_jax.weights.pretrained import find_base

_LOG = logging.getLogger(__name__)
_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"

# Keys that do not change what trained adapters compute, or that the tensors imply.
_IGNORED_KEYS = frozenset(
    """
    peft_version auto_mapping base_model_name_or_path revision task_type inference_mode
    target_modules exclude_modules lora_dropout megatron_core qalora_group_size
    """.split()
)
# Keys that change the adapters, and whether this package supports their value.
_SUPPORTED: Mapping[str, Callable[[Any], bool]] = {
    "r": lambda value: isinstance(value, int) and value > 0,
    "lora_alpha": lambda value: isinstance(value, int | float) and value > 0,
    "peft_type": lambda value: value == "LORA",
    "bias": lambda value: value == "none",
    # Other kinds of start change the base model as well.
    "init_lora_weights": lambda value: value in (True, False, "gaussian"),
    # Checked against the model.
    "rank_pattern": lambda value: not value or isinstance(value, dict),
    "alpha_pattern": lambda value: not value or isinstance(value, dict),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """Trained adapters, their scale and their base model.

    Attributes:
        params: the collection `lora` of a model.
        alpha: the adapters' output is scaled by alpha / rank.
        base_name: the name that the base model was loaded by. The folder has the name
            that `find_base` returns.
    """

    params: PyTree
    alpha: float
    base_name: str | None

    @property
    def rank(self) -> int:
        """The width of the adapters."""
        return named_leaves(self.params)[f"{PATHS[self.targets[0]]}/a"].shape[-1]

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections that have adapters."""
        leaves = named_leaves(self.params)
        return tuple(name for name, path in PATHS.items() if f"{path}/a" in leaves)

    @property
    def scale(self) -> float:
        """The `ModelConfig.lora_scale` of a model that uses these adapters."""
        return self.alpha / self.rank


def save_adapter(
    folder: str | os.PathLike[str], adapter: Adapter, config: ModelConfig
) -> None:
    """Writes a folder of PEFT, atomically; it replaces an earlier export.

    A warning says if PEFT cannot use adapters of experts in it with transformers 5.

    Args:
        config: of the base model.

    Raises:
        ValueError: the folder holds other files, or the adapters do not fit the config.
    """
    targets = adapter.targets
    if not targets:
        raise ValueError(f"params have adapters of none of {sorted(PATHS)}")
    _tell_lost_experts(config, targets)
    rank = adapter.rank
    table = adapter_table(config, rank=rank, targets=targets)
    modules = {row.names[0].split(".")[-3] for row in table}
    fused = {m: len(t) for m, t in fused_modules(config).items() if m in modules}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_name and find_base(adapter.base_name),
        "r": rank,
        "lora_alpha": _number(adapter.alpha),
        # As one adapter of that rank, with the same alpha / rank.
        "rank_pattern": {module: n * rank for module, n in fused.items()},
        "alpha_pattern": {m: _number(n * adapter.alpha) for m, n in fused.items()},
        "target_modules": target_modules(config, targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with replaced_folder(pathlib.Path(folder)) as place:
        _safetensors.write_file(
            place / _TENSORS, dict(table_tensors(table, adapter.params))
        )
        write_json(place / _CONFIG, values)


def load_adapter(folder: str | os.PathLike[str], config: ModelConfig) -> Adapter:
    """Returns the float32 adapters in a folder of PEFT, for a base model of `config`.

    Use them with `dataclasses.replace(config, lora_scale=adapter.scale)`.

    Raises:
        ValueError: naming the file that is missing or damaged, an option that is not
            supported, or tensors that do not fit the config.
    """
    path = pathlib.Path(folder)
    if not (path / _CONFIG).is_file():
        raise ValueError(f"{path} is no adapter folder: it has no {_CONFIG}")
    options = _read_options(path / _CONFIG)
    file = path / _TENSORS
    if not file.is_file():
        raise ValueError(
            f"{path} has no {_TENSORS}; pickled adapters are not supported, because "
            "they run code when they are read"
        )
    tensors = _safetensors.open_file(file)
    separate = _separate(path / _CONFIG, options, config)
    every = adapter_table(
        config,
        rank=options["r"],
        targets=adaptable(config),
        shared=fused_modules(config).keys() - separate,
    )
    found = {
        row.path.rpartition("/")[0]
        for row in every
        if any(name in tensors for name in row.names)
    }
    if not found:
        raise ValueError(f"{file} has no adapters of this model's projections")
    # A target with any tensor must have all of them.
    table = [row for row in every if row.path.rpartition("/")[0] in found]
    check_tensors(table, tensors, source=str(path))
    flat = {
        row.path: jnp.asarray(read_parameter(row, tensors, dtype=np.dtype(np.float32)))
        for row in table
    }
    flat = _in_use(flat, table, tensors, separate=separate)
    return Adapter(
        params=traverse_util.unflatten_dict(flat, sep="/"),
        alpha=float(options["lora_alpha"]),
        base_name=options.get("base_model_name_or_path"),
    )


def _tell_lost_experts(config: ModelConfig, targets: Collection[str]) -> None:
    """Warns of adapters of experts that PEFT 0.21.2 refuses, or leaves at 0.

    It joins those of gate and up, and finds them only where down has adapters too.
    """
    missing = [name for name in ("gate", "up", "down") if name not in targets]
    if config.experts is not None and missing and {"gate", "up"} & set(targets):
        _LOG.warning(
            "PEFT 0.21 with transformers 5 does not load these adapters of experts "
            "without those of %s; export merged weights instead, or train gate, up and "
            "down",
            ", ".join(missing),
        )


def _number(value: float) -> float:
    return int(value) if value % 1 == 0 else value


def _separate(
    file: pathlib.Path, options: Mapping[str, Any], config: ModelConfig
) -> set[str]:
    """The modules with an adapter for each of the projections that they are here.

    Raises:
        ValueError: another rank or scale than that of all.
    """
    fused = fused_modules(config)
    ranks = options.get("rank_pattern") or {}
    for key, base in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        expected = {m: len(fused.get(m, ())) * options[base] for m in ranks}
        if (options.get(key) or {}) != expected:
            raise ValueError(
                f"{file} has options that are not supported: {key}={options.get(key)!r}"
            )
    return set(ranks)


def _in_use(
    flat: Mapping[str, jnp.ndarray],
    table: Sequence[Parameter],
    tensors: Mapping[str, Tensor],
    *,
    separate: Collection[str],
) -> dict[str, jnp.ndarray]:
    """The factors, without those of projections that a separate module leaves out.

    Raises:
        ValueError: a module has more than the blocks of its projections.
    """
    rows = [row for row in table if row.names[0].split(".")[-3] in separate]
    own = {row.path: flat[row.path] for row in rows}
    for name, values in table_tensors(rows, traverse_util.unflatten_dict(own, sep="/")):
        tensor = tensors[name]
        read = tensor.read(tuple(slice(0, size) for size in tensor.shape))
        if not np.array_equal(values, read.astype(values.dtype)):
            raise ValueError(
                f"{name} in {tensor.file} mixes projections, which are separate here"
            )
    # A first factor of an adapter in use is never 0.
    unused = {
        row.path.rpartition("/")[0]
        for row in rows
        if row.path.endswith("/a") and not np.any(flat[row.path])
    }
    return {k: v for k, v in flat.items() if k.rpartition("/")[0] not in unused}


def _read_options(file: pathlib.Path) -> dict[str, Any]:
    try:
        options = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{file} is not a JSON object")
    wrong = [
        f"{key}={value!r}"
        for key, value in options.items()
        # By convention an option that is null, false, zero or empty is not in use.
        if key not in _IGNORED_KEYS and not _SUPPORTED.get(key, operator.not_)(value)
    ]
    if wrong:
        raise ValueError(
            f"{file} has options that are not supported: {', '.join(wrong)}"
        )
    return options
