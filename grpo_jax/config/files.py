"""YAML files of a configuration, strict JSON, and atomic writes."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grpo_jax.config import validation
from grpo_jax.config.objective import ObjectiveConfig
from grpo_jax.config.run import EMBEDDED, TrainConfig


class _Reader(yaml.SafeLoader):
    """YAML in which 1e-6 is a number, as in version 1.2, and not a string."""


class _Writer(yaml.SafeDumper):
    """Quotes strings that `_Reader` would read as numbers, such as '1e-6'."""


for _kind in (_Reader, _Writer):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write indented, strict JSON with `write_text`."""
    write_text(path, json.dumps(to_jsonable(values), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader, or a crash, sees the old file or the new one.

    A pipe or a device, such as /dev/stdout, is written to and not replaced.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # where a link points: the link itself stays
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        # Without it the new name can reach the disk before the content does; after a
        # power failure the file would then be empty.
        fsync(temporary)
        if path.exists():
            shutil.copymode(path, temporary)  # one that was made private stays so
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def fsync(path: Path) -> None:
    """Return once the content of a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def to_json_line(record: Mapping[str, Any]) -> str:
    """`record` as one line of strict JSON, without the newline.

    NaN and infinities, which JSON does not have, become null. Numbers and arrays of
    NumPy and JAX become JSON numbers and lists. Raises TypeError for other values.
    """
    return json.dumps(to_jsonable(record), allow_nan=False)


def to_jsonable(value: Any, *, other: Callable[[Any], Any] | None = None) -> Any:
    """`value` as strict JSON has it: strings, finite numbers, null, lists, objects.

    `other` converts a value that is none of these; by default it is a TypeError.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item, other=other) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item, other=other) for item in value]
    array = np.asarray(value)
    if array.dtype.kind in "OS":  # any object, bytes
        if other is None:
            raise TypeError(f"cannot write {type(value).__name__} {value!r} as JSON")
        return other(value)
    # Through float32, numpy's own types and bfloat16 (no numpy type) alike.
    if array.dtype.kind not in "biufU":
        array = array.astype(np.float32)
    return to_jsonable(array.tolist(), other=other)


def load_config(file: Path, *, model: str | None = None) -> TrainConfig:
    """The configuration in a YAML file; missing fields take the model's defaults.

    Args:
      model: replaces the model that the file names.

    Raises:
      ValueError: for a file that is not YAML, an unknown field or a wrong value.
    """
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Reader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read as YAML: {reason}") from error
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ValueError(f"{file} must hold a mapping of fields, as config.yaml does.")
    objective = values.get("objective")
    if isinstance(objective, Mapping) and "preset" in objective:
        preset = ObjectiveConfig.preset(objective["preset"])
        others = {name: value for name, value in objective.items() if name != "preset"}
        values = {**values, "objective": validation.to_dict(preset) | others}
    name = values.get("model", EMBEDDED) if model is None else model
    defaults = validation.to_dict(TrainConfig(model=name))
    given = validation.overlay(defaults, {**values, "model": name})
    return validation.from_dict(TrainConfig, given)


def to_yaml(config: TrainConfig) -> str:
    """The configuration as a YAML file that `load_config` reads."""
    return yaml.dump(validation.to_dict(config), Dumper=_Writer, sort_keys=False)
