"""The command line: `grpo-jax train | plan | eval | sample | export | plot | report`.

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
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from grpo_jax.config import EMBEDDED, TrainConfig
from grpo_jax.flags import ConfigFile, Preset, Run, base_config
from grpo_jax.parallel.compile_cache import use_compile_cache

if TYPE_CHECKING:
    from grpo_jax.training.restore import Restored

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
) -> None:
    """Train a model by GRPO, or resume the run in --run-dir.

    Without flags, the packaged model learns arithmetic.
    """
    from grpo_jax.reporting.console import is_terminal, next_commands
    from grpo_jax.training import loop

    result = loop.train(run)
    if not is_terminal(sys.stdout):
        return
    # With several processes, only the first has the history.
    if result.history and result.summary["status"] == "finished":
        print(next_commands(result.run_dir, run))


def _plan(
    run: Run = TrainConfig(),  # noqa: B008
    *,
    config: ConfigFile = None,
    preset: Preset = None,
    devices: int | None = None,
    device: str | None = None,
    device_memory_gib: float | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Estimate the memory that a run needs on each device; starts nothing.

    Takes the flags of train and its own. It needs only the config.json of a model.

    Args:
      devices: number of devices of the mesh; by default the product of its sizes, or
        the devices of this machine.
      device: v4, v5e, v5p, v6e, a100, h100 or h200, or the type of a TPU slice: v5p-16
        has 8 devices, because it counts cores.
      device_memory_gib: memory of one device, instead of a name.
      as_json: print JSON, with sizes in bytes.

    Raises:
      ValueError: for a run that is not possible, a mesh that does not divide, or an
        unknown device.
    """
    from grpo_jax.planning.advice import make_plan
    from grpo_jax.planning.table import print_plan

    made = make_plan(run, devices=devices, device=device, memory_gib=device_memory_gib)
    if as_json:
        print(json.dumps(made, indent=2))
    else:
        print_plan(made)


def _evaluate(
    *,
    run_dir: Path | None = None,
    model: str | None = None,
    task: str | None = None,
    data: str | None = None,
    step: int | Literal["best"] | None = None,
    prompts: int | None = None,
    samples: int = 1,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    completions: Path | None = None,
) -> None:
    """Measure accuracy on held-out prompts, and print it as JSON.

    The strict accuracy requires the format of the task, the lenient one does not.

    Both are printed with their standard errors.

    Args:
      run_dir: directory of the run that is evaluated.
      model: hub name, folder, .gguf file or embedded, instead of a run.
      task: arithmetic, gsm8k, reasoning_gym:NAME or a .jsonl file; by default that of
        the run, or arithmetic for a model.
      data: local file or folder with the task's rows; by default that of the run.
      step: the checkpoint of the run, or best; by default the newest.
      prompts: number of held-out prompts; by default all.
      samples: completions per prompt; two or more also report pass@k and majority.
      temperature: temperature of sampling; by default 0 (greedy) for one sample, else
        that of the run, or 1 for a model.
      max_new_tokens: limit of a completion in tokens; by default that of the run, or
        one that suits the model.
      batch_size: completions sampled at once; by default the run's eval_batch_size, or
        128. Fewer need less memory. Completions of one prompt stay together.
      seed: seed of the sampling.
      out: also write the JSON to this file.
      completions: write every completion and its result to this .jsonl file.
    """
    _check_counts(
        prompts=prompts,
        samples=samples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    from grpo_jax.tasks import load_task
    from grpo_jax.tasks.base import describe_held_out
    from grpo_jax.training.evaluate import BATCH
    from grpo_jax.training.evaluate import evaluate as measure
    from grpo_jax.training.restore import open_policy

    policy = open_policy(run_dir=run_dir, model=model, step=step)
    config = policy.config
    if task is None:
        task, data = config.task, data or config.data
        _check_stored(task, run_dir)
    sampling = policy.sampling(samples=samples, temperature=temperature)
    loaded = load_task(task, data=data, seed=config.seed)
    _warn_of_unknown(policy, [row["prompt"] for row in loaded.test])
    max_new_tokens = max_new_tokens or config.max_new_tokens
    result = measure(
        policy.model,
        policy.params,
        policy.tokenizer,
        loaded,
        prompts=prompts,
        samples=samples,
        sampling=sampling,
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size or config.eval_batch_size or BATCH,
    )
    settings = {
        "model": config.model if run_dir is None else str(run_dir),
        "step": policy.step,
        "task": task,
        "held_out": describe_held_out(loaded),
        "temperature": sampling.temperature,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    text = json.dumps(settings | result.summary(), indent=2, allow_nan=False)
    print(text)
    if out is not None:
        _write(out, text + "\n")
    if completions is not None:
        records = result.records(loaded.test)
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        _write(completions, "".join(lines))


def _warn_of_unknown(policy: "Restored", prompts: Sequence[Any]) -> None:
    """Warn of prompts that the embedded model, unless trained by a run, cannot know."""
    from grpo_jax.tasks.arithmetic import unknown_to_embedded

    if policy.step is None and policy.config.model == EMBEDDED:
        if text := unknown_to_embedded(prompts):
            print(f"warning: {text}", file=sys.stderr)


def _check_stored(task: str, run_dir: Path | None) -> None:
    """Raises ValueError for a run whose rows its configuration does not name."""
    from grpo_jax.tasks.base import CALLERS_ROWS
    from grpo_jax.training.restore import trained_task

    rows = None if run_dir is None else trained_task(run_dir)
    if rows == CALLERS_ROWS and Path(task).stem != CALLERS_ROWS:
        raise ValueError(
            f"{run_dir} was trained on rows given from Python, which are not stored; "
            "name a task with --task."
        )


def _write(path: Path, text: str) -> None:
    from grpo_jax.config.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _sample(
    *,
    prompt: str,
    model: str | None = None,
    run_dir: Path | None = None,
    step: int | Literal["best"] | None = None,
    samples: int = 1,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> None:
    """Print completions of a prompt, with the sampling settings of the run.

    Args:
      prompt: the text; for a chat model, the message of a user.
      model: hub name, folder or .gguf file; by default the embedded model.
      run_dir: directory of a run, instead of a model.
      step: the checkpoint of the run, or best; by default the newest.
      samples: number of completions.
      temperature: temperature of sampling; by default 0 (greedy) for one sample, else
        that of the run, or 1 for a model.
      max_new_tokens: limit of a completion in tokens; by default that of the run, or
        one that suits the model.
      seed: seed of the sampling.
    """
    _check_counts(samples=samples, max_new_tokens=max_new_tokens)
    from grpo_jax.reporting.text import escape_control_chars
    from grpo_jax.training.evaluate import complete
    from grpo_jax.training.restore import open_policy

    if model is None and run_dir is None:
        model = EMBEDDED
    policy = open_policy(run_dir=run_dir, model=model, step=step)
    _warn_of_unknown(policy, [prompt])
    texts = complete(
        policy.model,
        policy.params,
        policy.tokenizer,
        [prompt],
        samples=samples,
        sampling=policy.sampling(samples=samples, temperature=temperature),
        max_new_tokens=max_new_tokens or policy.config.max_new_tokens,
        seed=seed,
    )
    for text in texts[0]:
        print(escape_control_chars(text))


def _export(
    *,
    run_dir: Path,
    out: Path | None = None,
    step: int | Literal["best"] | None = None,
    adapter: bool = False,
) -> None:
    """Write a checkpoint of a run as a Hugging Face folder.

    Args:
      run_dir: the run.
      out: the folder; by default RUN_DIR/export, or RUN_DIR/adapter for adapters.
      step: the checkpoint, or best; by default the newest.
      adapter: write only the adapters, for PEFT; by default they are merged.
    """
    if adapter:
        from grpo_jax.training.restore import restore_adapter
        from grpo_jax.weights.adapter import save_adapter

        folder = out or run_dir / "adapter"
        found, adapters, config = restore_adapter(run_dir, step)
        save_adapter(folder, adapters, config)
        print(f"adapters of step {found} written to {folder}")
        return
    from grpo_jax.rollout.draw import policy_sampling
    from grpo_jax.training.restore import open_policy
    from grpo_jax.weights.pretrained import Pretrained, save_pretrained

    policy = open_policy(run_dir=run_dir, step=step)
    folder = out or run_dir / "export"
    model = policy.model
    exported = Pretrained(model, policy.params, policy.tokenizer, model.config)
    sampling = policy_sampling(model.config, policy.tokenizer, policy.config.sampling)
    save_pretrained(folder, exported, sampling=sampling)
    print(f"step {policy.step} written to {folder}")


def _plot(
    runs: tyro.conf.Positional[tuple[Path, ...]] = (),
    *,
    run_dir: tuple[Path, ...] = (),
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


def _report(run: tyro.conf.Positional[Path], *, out: Path | None = None) -> None:
    """Write one HTML page with the curves and completions of a run.

    Args:
      run: the directory of the run.
      out: the file; by default RUN/report.html.
    """
    from grpo_jax.reporting.page import write_report

    print(f"written to {write_report(run, out)}")


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {count}.")
