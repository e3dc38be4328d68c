"""Adapters as folders of PEFT, which loads them onto the base model, and back.

Files: adapter_config.json and adapter_model.safetensors, with one pair of tensors per
layer and projection. https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.lora import PATHS, adaptable
from grpo_jax.weights import safetensors
from grpo_jax.weights.folder import replaced_folder
from grpo_jax.weights.names import (
    adapter_table,
    check_tensors,
    read_parameter,
    table_tensors,
)
from grpo_jax.weights.pretrained import find_base

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

# Keys without effect on what trained adapters compute, or told by the tensors.
_IGNORED_KEYS = frozenset(
    """
    peft_version auto_mapping base_model_name_or_path revision task_type inference_mode
    target_modules exclude_modules lora_dropout megatron_core qalora_group_size
    """.split()
)
# Keys that change the adapters, and the values at which they are those of this package.
_FIXED_KEYS: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Other kinds of start change the base model as well.
    "init_lora_weights": (True, False, "gaussian"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """Trained adapters, with what it takes to use them.

    Attributes:
        params: the collection `lora` of a model.
        alpha: the adapters' output is scaled by alpha / rank.
        base_name: the model that they stand on, as it was loaded; written as
            `find_base` gives it.
    """

    params: PyTree
    alpha: float
    base_name: str | None

    @property
    def rank(self) -> int:
        """The width of the adapters."""
        return self._flat[(*PATHS[self.targets[0]], "a")].shape[-1]

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections that have adapters."""
        present = {path[:-1] for path in self._flat}
        return tuple(name for name, path in PATHS.items() if path in present)

    @property
    def scale(self) -> float:
        """What `ModelConfig.lora_scale` must be for these adapters."""
        return self.alpha / self.rank

    @property
    def _flat(self) -> dict[tuple[str, ...], Any]:
        flat: Any = traverse_util.flatten_dict(self.params)
        return flat


def save_adapter(
    folder: str | os.PathLike[str], adapter: Adapter, config: ModelConfig
) -> None:
    """Writes a folder of PEFT, whole or not at all; an earlier export is replaced.

    Args:
        config: of the base model.

    Raises:
        ValueError: the folder holds other files, or the adapters do not fit the config.
    """
    targets = adapter.targets
    if not targets:
        raise ValueError(f"the adapters are of none of the projections {sorted(PATHS)}")
    rank = adapter.rank
    table = adapter_table(config, rank=rank, targets=targets)
    modules = sorted({row.names[0].split(".")[-3] for row in table})
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_name and find_base(adapter.base_name),
        "r": rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha % 1 == 0 else adapter.alpha,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with replaced_folder(pathlib.Path(folder)) as place:
        safetensors.write_file(
            place / TENSORS, dict(table_tensors(table, adapter.params))
        )
        (place / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def load_adapter(folder: str | os.PathLike[str], config: ModelConfig) -> Adapter:
    """The float32 adapters in a folder of PEFT, for a base model of this configuration.

    Use them with `dataclasses.replace(config, lora_scale=adapter.scale)`.

    Raises:
        ValueError: naming the file that is missing or damaged, an option that these
            adapters do not have, or tensors that do not fit the config.
    """
    path = pathlib.Path(folder)
    options = _read_options(path / CONFIG)
    if not (path / TENSORS).is_file():
        raise ValueError(
            f"{path} has no {TENSORS}; pickled adapters are not supported, because "
            "they run code when they are read"
        )
    tensors = safetensors.open_file(path / TENSORS)
    rank = options["r"]
    every = {
        n: adapter_table(config, rank=rank, targets=(n,)) for n in adaptable(config)
    }
    # A target with any tensor must have all of them.
    found = [
        target
        for target, rows in every.items()
        if any(name in tensors for row in rows for name in row.names)
    ]
    if not found:
        raise ValueError(
            f"{path / TENSORS} has no adapters of this model's projections"
        )
    table = adapter_table(config, rank=rank, targets=found)
    check_tensors(table, tensors, source=str(path))
    flat = {}
    for row in table:
        whole = (slice(None),) * len(row.shape)
        values = read_parameter(row, tensors, whole, dtype=np.dtype(np.float32))
        flat[row.path] = jnp.asarray(values)
    return Adapter(
        params=traverse_util.unflatten_dict(flat, sep="/"),
        alpha=float(options["lora_alpha"]),
        base_name=options.get("base_model_name_or_path"),
    )


def _read_options(file: pathlib.Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file.parent} is no adapter folder: it has no {CONFIG}")
    try:
        options = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{file} is not a JSON object")
    wrong = [
        f"{key}={value!r}"
        for key, value in options.items()
        if not _is_supported(key, value)
    ]
    if wrong:
        raise ValueError(f"{file} asks for what is not supported: {', '.join(wrong)}")
    return options


def _is_supported(key: str, value: Any) -> bool:
    if key in _IGNORED_KEYS:
        return True
    if key in _FIXED_KEYS:
        return value in _FIXED_KEYS[key]
    if key == "r":
        return isinstance(value, int) and value > 0
    if key == "lora_alpha":
        return isinstance(value, int | float) and value > 0
    # By custom an option that is null, false, zero or empty is not in use.
    return not value
