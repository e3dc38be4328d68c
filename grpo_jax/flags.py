"""The flags of `grpo-jax train` and `plan`, as a configuration.

Made by tyro from the configuration's fields, with a few that set many at once.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from grpo_jax.config import EMBEDDED, PRESETS, ObjectiveConfig, TrainConfig
from grpo_jax.config.trl_names import TRL_NAMES, TRL_PAGE

_TWO_FLAGS = f"""Two more flags set many fields at once, and every other flag overrides
them:

  --config FILE              a YAML file of fields, such as a run's own config.yaml
  --objective.preset NAME    the objective of a paper: {", ".join(PRESETS)}
"""
_TRAIN_HELP = f"""Train a model by GRPO, or resume the run in --run-dir.

Without arguments: the embedded model on arithmetic. {_TWO_FLAGS}"""
_PLAN_HELP = f"""Estimate the memory that a run needs on each device; starts nothing.

Takes the flags of `grpo-jax train` and those below. Of a model, config.json is enough.

  --devices COUNT            of the mesh; by default what its sizes say, or what is here
  --device NAME              v4, v5e, v5p, v6e, a100, h100 or h200, or the type of a
                             TPU slice: v5p-16 is 8 devices, since it counts cores
  --device-memory-gib SIZE   of one device, in place of a name
  --json                     plain values, sizes in bytes

{_TWO_FLAGS}"""


def train_config(
    arguments: Sequence[str], *, prog: str = "train", description: str = _TRAIN_HELP
) -> TrainConfig:
    """The configuration that the flags of `grpo-jax train` describe.

    `--config` sets the base, in which `--model` takes the place of the file's model;
    what the file leaves out are the defaults that suit the model. Then
    `--objective.preset` replaces the objective; the other flags have the last word.

    Raises:
      ValueError: for a file that cannot be read or values that cannot be.
    """
    first = argparse.ArgumentParser(
        prog=f"grpo-jax {prog}", add_help=False, allow_abbrev=False
    )
    first.add_argument("--config", type=Path)
    first.add_argument("--objective.preset", dest="preset")
    first.add_argument("--model")
    chosen, rest = first.parse_known_args(arguments)
    _explain_trl_names(rest)
    if chosen.config is not None:
        from grpo_jax.config.files import load_config

        base = load_config(chosen.config, model=chosen.model)
    else:
        base = TrainConfig(model=EMBEDDED if chosen.model is None else chosen.model)
    if chosen.preset is not None:
        objective = ObjectiveConfig.preset(chosen.preset)
        base = dataclasses.replace(base, objective=objective)
    return tyro.cli(
        TrainConfig,
        default=base,
        args=list(rest),
        prog=f"grpo-jax {prog}",
        description=description,
    )


def _explain_trl_names(arguments: Sequence[str]) -> None:
    flags = [word for word in arguments if word.startswith("--")]
    names = [flag[2:].partition("=")[0].replace("-", "_") for flag in flags]
    known = dict.fromkeys(name for name in names if name in TRL_NAMES)
    if known:
        here = [TRL_NAMES[name].replace("_", "-") for name in known]
        pairs = zip(known, here, strict=True)
        told = "; ".join(f"{name} is --{flag} here" for name, flag in pairs)
        raise ValueError(f"{told}. {TRL_PAGE}.")


def plan_flags(
    arguments: Sequence[str],
) -> tuple[argparse.Namespace, TrainConfig]:
    """What the flags of `grpo-jax plan` ask for: its own, and the run."""
    own = argparse.ArgumentParser(
        prog="grpo-jax plan", add_help=False, allow_abbrev=False
    )
    own.add_argument("--devices", type=int)
    own.add_argument("--device")
    own.add_argument("--device-memory-gib", type=float)
    own.add_argument("--json", action="store_true")
    asked, rest = own.parse_known_args(arguments)
    return asked, train_config(rest, prog="plan", description=_PLAN_HELP)


def all_train_flags(
    options: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(),  # noqa: B008
    *,
    config: Path | None = None,
) -> None:
    """Train a model by GRPO, or resume a run."""


def all_plan_flags(
    options: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(),  # noqa: B008
    *,
    config: Path | None = None,
    devices: int | None = None,
    device: str | None = None,
    device_memory_gib: float | None = None,
    json: bool = False,
) -> None:
    """Estimate the memory that a run needs on each device."""
