"""Flags of a run: the fields of `TrainConfig`, and those that are none of them."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from grpo_jax.config import EMBEDDED, PRESETS, ObjectiveConfig, TrainConfig
from grpo_jax.config.trl_names import TRL_NAMES, TRL_PAGE

# Arguments of a command. A run has no name, so that its flags have no prefix. The next
# two are already applied to the run that the command gets: `base_config`.
Run = Annotated[TrainConfig, tyro.conf.arg(name="")]
_FILE = "a YAML file of fields, such as a run's config.yaml; flags override it"
ConfigFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=_FILE)]
_PRESET = "the objective of a paper; sets all its fields, which other flags override"
_NAMES = "{" + ",".join(PRESETS) + "}"
Preset = Annotated[
    str | None, tyro.conf.arg(name="objective.preset", metavar=_NAMES, help=_PRESET)
]
# What the policy plays with: looked up by `environments.named`.
_FORM = "package.module:NAME or path/to/file.py:NAME"
_TOOLS = f"functions that the policy may call, each {_FORM}"
NamedTools = Annotated[tuple[str, ...], tyro.conf.arg(help=_TOOLS)]
_ENVIRONMENT = f"class or function that makes environments to play in, {_FORM}"
NamedEnvironment = Annotated[
    str | None, tyro.conf.arg(metavar="NAME", help=_ENVIRONMENT)
]


def base_config(arguments: Sequence[str], *, prog: str) -> TrainConfig:
    """The configuration that all flags but three override.

    The base is the file of `--config`, in which `--model` replaces the model. Fields
    that the file leaves out have the defaults of the model. Then `--objective.preset`
    replaces the objective.

    Raises:
      ValueError: for a flag of TRL, with our name of it; for a file that cannot be
        read, and values that are not allowed.
    """
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--objective.preset", dest="preset")
    parser.add_argument("--model")
    chosen, rest = parser.parse_known_args(arguments)
    flags = [word for word in rest if word.startswith("--")]
    names = [flag[2:].partition("=")[0].replace("-", "_") for flag in flags]
    answers = [
        f"{name} is --{TRL_NAMES[name].replace('_', '-')} here"
        for name in dict.fromkeys(names)
        if name in TRL_NAMES
    ]
    if answers:
        raise ValueError(f"{'; '.join(answers)}. {TRL_PAGE}.")
    if chosen.config is None:
        base = TrainConfig(model=EMBEDDED if chosen.model is None else chosen.model)
    else:
        from grpo_jax.config.files import load_config

        base = load_config(chosen.config, model=chosen.model)
    if chosen.preset is None:
        return base
    objective = ObjectiveConfig.preset(chosen.preset)
    return dataclasses.replace(base, objective=objective)
