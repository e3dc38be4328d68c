"""The command line: `grpo-jax train | plan | eval | sample | chat | export | ...`.

tyro makes the flags from the arguments of each command and the fields of the
configuration. A command imports heavy modules itself, because the worker process that
scores rewards imports this file again.
"""

import functools
import inspect
import json
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import tyro

from grpo_jax.commands import chat as _chat
from grpo_jax.commands import evaluate as _evaluate
from grpo_jax.commands import sample as _sample
from grpo_jax.config import TrainConfig
from grpo_jax.environments.named import load_environment, load_tools
from grpo_jax.flags import (
    ConfigFile,
    NamedEnvironment,
    NamedTools,
    Preset,
    Run,
    base_config,
)
from grpo_jax.parallel.compile_cache import use_compile_cache

# tyro does not wrap this text, so a paragraph is one line of at most 80 columns.
_HELP = """GRPO post-training of language models in JAX.

Without flags, grpo-jax train teaches the packaged model arithmetic, on a CPU.

Use grpo-jax COMMAND --help for the flags of a command, and --version for the version.

Option --tyro-print-completion {bash,zsh,tcsh} prints a completion script.
"""


def main() -> None:
    """Run the command that the arguments name; bad input ends with status 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    use_compile_cache()
    try:
        _dispatch(sys.argv[1:])
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    finally:
        if "jax" in sys.modules:
            from grpo_jax.parallel.processes import leave_processes

            leave_processes()


def _dispatch(arguments: Sequence[str]) -> None:
    name = arguments[0] if arguments else ""
    commands = {
        "train": _train,
        "plan": _plan,
        "eval": _evaluate,
        "sample": _sample,
        "chat": _chat,
        "export": _export,
        "plot": _plot,
        "report": _report,
    }
    for command in commands.values():
        # tyro would keep the line breaks within the description of an argument.
        command.__doc__ = re.sub(r"\n {4,}", " ", inspect.getdoc(command) or "")
    if name == "--version":
        print(f"grpo-jax {version('grpo-jax')}")
    elif name in commands:
        command, prog = commands[name], f"grpo-jax {name}"
        if name in ("train", "plan"):
            # The other flags override this base, and --help shows it as the defaults.
            base = base_config(arguments[1:], prog=prog)
            command = functools.partial(command, run=base)
        tyro.cli(command, prog=prog, args=arguments[1:])
    else:  # The first help, a completion script, or a typo.
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="grpo-jax", description=_HELP, args=arguments
        )


def _train(
    run: Run = TrainConfig(),  # noqa: B008
    *,
    config: ConfigFile = None,
    preset: Preset = None,
    tools: NamedTools = (),
    environment: NamedEnvironment = None,
) -> None:
    """Train a model by GRPO, or resume the run in --run-dir.

    Without flags, the packaged model learns arithmetic.
    """
    from grpo_jax.reporting.console import is_terminal, next_commands
    from grpo_jax.training import loop

    result = loop.run_to_end(
        run,
        with_params=False,
        tools=load_tools(tools),
        environment_factory=load_environment(environment),
    )
    if not is_terminal(sys.stdout):
        return
    # With several processes, only the first has the history.
    if result.history and result.summary["status"] == "finished":
        played = ["--tools", *tools] if tools else []
        if environment is not None:
            played += ["--environment", environment]
        print(next_commands(result.run_dir, run, played=played))


def _plan(
    run: Run = TrainConfig(),  # noqa: B008
    *,
    config: ConfigFile = None,
    preset: Preset = None,
    devices: int | None = None,
    device: str | None = None,
    device_memory_gib: float | None = None,
    target: Annotated[str | None, tyro.conf.arg(name="compile")] = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    tools: NamedTools = (),
    environment: NamedEnvironment = None,
) -> None:
    """Estimate the memory that a run needs on each device; starts nothing.

    Takes the flags of train and its own. It needs only the config.json of a model.

    Args:
      devices: number of devices of the mesh; by default the product of its sizes, or
        the devices of this machine.
      device: v4, v5e, v5p, v6e, a100, h100 or h200, or the type of a TPU slice: v5p-16
        has 8 devices, because it counts cores.
      device_memory_gib: memory of one device, instead of a name.
      target: compile the programs of the run as well, for a TPU slice such as v5e:2x4,
        v6e:4x4 or v5p:2x2x1, which need not be here, or for cpu or gpu.
      as_json: print JSON, with sizes in bytes.
      tools: as for train; they need no memory of devices, nor does the environment.

    Raises:
      ValueError: for a run that is not possible, a mesh that does not divide, an
        unknown device, or a slice for which nothing can be compiled here.
    """
    from grpo_jax.planning.advice import make_plan
    from grpo_jax.planning.table import print_plan

    if target is None:
        made = make_plan(
            run, devices=devices, device=device, memory_gib=device_memory_gib
        )
    else:
        from grpo_jax.training.compile_plan import compile_plan

        if device is not None:
            raise ValueError(
                f"--compile {target} names the device; leave --device {device} out."
            )
        made = compile_plan(
            run,
            target,
            devices=devices,
            memory_gib=device_memory_gib,
            announce=functools.partial(print, file=sys.stderr, flush=True),
        )
    if as_json:
        print(json.dumps(made, indent=2))
    else:
        print_plan(made)
    if made["refused"] is not None:
        sys.exit(2)  # as the run would


def _export(
    *,
    run_dir: str,
    out: Path | None = None,
    step: int | Literal["best"] | None = None,
    adapter: bool = False,
) -> None:
    """Write a checkpoint of a run as a Hugging Face folder.

    Args:
      run_dir: the run.
      out: the folder; by default RUN_DIR/export, or RUN_DIR/adapter for adapters. Of a
        run in a bucket, the folder export or adapter here.
      step: the checkpoint, or best; by default the newest.
      adapter: write only the adapters, for PEFT; by default they are merged.
    """
    from grpo_jax.checkpointing.bucket import bucket_address

    home = Path(run_dir if bucket_address(run_dir) is None else "")
    if adapter:
        from grpo_jax.training.restore import restore_adapter
        from grpo_jax.weights.adapter import save_adapter

        folder = out or home / "adapter"
        found, adapters, config = restore_adapter(run_dir, step)
        save_adapter(folder, adapters, config)
        print(f"adapters of step {found} written to {folder}")
        return
    from grpo_jax.rollout.draw import policy_sampling
    from grpo_jax.training.restore import open_policy
    from grpo_jax.weights.pretrained import Pretrained, save_pretrained

    policy = open_policy(run_dir=run_dir, step=step)
    folder = out or home / "export"
    model = policy.model
    exported = Pretrained(model, policy.params, policy.tokenizer, model.config)
    sampling = policy_sampling(model.config, policy.tokenizer, policy.config.sampling)
    save_pretrained(folder, exported, sampling=sampling)
    print(f"step {policy.step} written to {folder}")


def _plot(
    runs: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    run_dir: tuple[str, ...] = (),
    out: Path = Path("metrics.png"),
) -> None:
    """Plot the curves of one or more runs in one picture.

    Args:
      runs: directories of runs.
      run_dir: the same, as a flag.
      out: the PNG file.
    """
    from grpo_jax.reporting.plots import plot_runs

    plot_runs([*runs, *run_dir], out)
    print(f"written to {out}")


def _report(run: tyro.conf.Positional[str], *, out: Path | None = None) -> None:
    """Write one HTML page with the curves and completions of a run.

    Args:
      run: the directory of the run.
      out: the file; by default RUN/report.html, or report.html here for a bucket.
    """
    from grpo_jax.reporting.page import write_report

    print(f"written to {write_report(run, out)}")
