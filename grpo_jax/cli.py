"""The command line: `grpo-jax train | eval | sample | export | plot | report`.

Flags are made from the configuration's fields by tyro. Nothing heavy is imported before
a command is chosen: the worker process that scores rewards imports this module again.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import arg

from grpo_jax.config import EMBEDDED, PRESETS, ObjectiveConfig, TrainConfig


def main() -> None:
    """Run the command that the arguments name; bad input ends with status 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        _dispatch(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _dispatch(arguments: list[str]) -> None:
    if arguments[:1] == ["train"]:
        return _train(arguments[1:])
    commands = {
        "train": train,
        "eval": evaluate,
        "sample": sample,
        "export": export,
        "plot": plot,
        "report": report,
    }
    tyro.extras.subcommand_cli_from_dict(
        commands, prog="grpo-jax", description=__doc__, args=arguments
    )
    return None
