"""The command line: `grpo-jax train | plan | eval | sample | export | plot | report`.

Flags are made by tyro from the configuration's fields and the commands' arguments.
Heavy modules are imported by the command that needs them: the worker process that
scores rewards imports this file again.
"""

import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from grpo_jax.config import EMBEDDED, TrainConfig
from grpo_jax.flags import all_plan_flags, all_train_flags, plan_flags, train_config
from grpo_jax.parallel.compile_cache import use_compile_cache

if TYPE_CHECKING:
    from grpo_jax.training.restore import Restored

_HELP = """GRPO post-training of language models in JAX.

grpo-jax train without a flag is a first run: a small model that comes with the package
learns arithmetic, in a minute or two on a CPU. grpo-jax COMMAND --help explains each
command; --version tells the version, and --tyro-print-completion {bash,zsh,tcsh} prints
a script that completes commands and flags in your shell.
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
    if arguments[:1] == ["--version"]:
        print(f"grpo-jax {version('grpo-jax')}")
        return
    if arguments[:1] == ["train"]:
        _train(train_config(arguments[1:]))
        return
    if arguments[:1] == ["plan"]:
        plan(arguments[1:])
        return
    commands = {
        "train": _train_help,
        "plan": _plan_help,
        "eval": evaluate,
        "sample": sample,
        "export": export,
        "plot": plot,
        "report": report,
    }
    if any(word.startswith("--tyro-") for word in arguments[:1]):
        # For the shell: these two are parsed by functions of their own.
        commands |= {"train": all_train_flags, "plan": all_plan_flags}
    tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="grpo-jax",
        description=_HELP,
        args=arguments,
    )


def _train(config: TrainConfig) -> None:
    from grpo_jax.reporting.console import is_terminal, next_commands
    from grpo_jax.training.loop import train

    result = train(config)
    if not is_terminal(sys.stdout):
        return
    # Of several processes, the first has the history.
    if result.history and result.summary["status"] == "finished":
        print(next_commands(result.run_dir, config))


def _train_help() -> None:
    """Train a model by GRPO, or resume a run."""


def _plan_help() -> None:
    """Estimate the memory that a run needs on each device."""


def plan(arguments: Sequence[str]) -> None:
    """Print the memory that a run needs on each device, as a table or as JSON.

    Raises:
      ValueError: for a run that cannot be, a mesh that does not divide, or a device
        that is not known.
    """
    asked, config = plan_flags(arguments)
    from grpo_jax.planning.resolve import make_plan

    made = make_plan(
        config,
        devices=asked.devices,
        device=asked.device,
        memory_gib=asked.device_memory_gib,
    )
    if asked.json:
        print(json.dumps(made, indent=2))
        return
    from grpo_jax.planning.table import print_plan

    print_plan(made)


def evaluate(
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
    """Measure accuracy on held-out prompts, as JSON.

    Answers are read strictly, in the format that the task asks for, and leniently,
    wherever a completion ends with one; each number has its standard error.

    Args:
      run_dir: the run whose policy is measured.
      model: or a model: hub name, folder, .gguf file, or the embedded model.
      task: arithmetic, gsm8k, reasoning_gym:NAME or a .jsonl file; by default the run's
        own, or arithmetic for a model.
      data: local file or folder with the task's rows; by default the run's own.
      step: the checkpoint of the run, or best; the newest by default.
      prompts: how many held-out prompts; all by default.
      samples: completions per prompt; from two on, pass@k and majority are told too.
      temperature: of sampling; by default 0 (greedy) for one sample, else the run's, or
        1 for a model.
      max_new_tokens: completions are cut at this length; by default the run's, or what
        suits the model.
      batch_size: completions sampled at once; by default the run's eval_batch_size, or
        128. Fewer need less memory; those of one prompt are never parted.
      seed: of the sampling.
      out: also write the JSON to this file.
      completions: write every completion with its verdict to this .jsonl file.
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
        if run_dir is not None:
            _check_task_is_known(run_dir, config)
        task, data = config.task, data or config.data
    sampling = policy.sampling(samples=samples, temperature=temperature)
    loaded = load_task(task, data=data, seed=config.seed)
    _warn_of_strange(policy, [row["prompt"] for row in loaded.test])
    result = measure(
        policy.model,
        policy.params,
        policy.tokenizer,
        loaded,
        prompts=prompts,
        samples=samples,
        sampling=sampling,
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=max_new_tokens or config.max_new_tokens,
        seed=seed,
        batch_size=batch_size or config.eval_batch_size or BATCH,
    )
    asked = {
        "model": config.model if run_dir is None else str(run_dir),
        "step": policy.step,
        "task": task,
        "held_out": describe_held_out(loaded),
        "temperature": sampling.temperature,
        "max_new_tokens": max_new_tokens or config.max_new_tokens,
        "seed": seed,
    }
    text = json.dumps(asked | result.summary(), indent=2, allow_nan=False)
    print(text)
    if out is not None:
        _write(out, text + "\n")
    if completions is not None:
        records = result.records(loaded.test)
        lines = (json.dumps(record, allow_nan=False) for record in records)
        _write(completions, "".join(line + "\n" for line in lines))


def _warn_of_strange(policy: "Restored", prompts: Sequence[Any]) -> None:
    """Tell what the embedded model, unless trained by a run, cannot know."""
    from grpo_jax.tasks.arithmetic import unknown_to_embedded

    if policy.step is None and policy.config.model == EMBEDDED:
        if text := unknown_to_embedded(prompts):
            print(f"warning: {text}", file=sys.stderr)


def _check_task_is_known(run_dir: Path, config: TrainConfig) -> None:
    from grpo_jax.tasks.base import CALLERS_ROWS
    from grpo_jax.training.manifest import read_data

    came_from = read_data(run_dir).get("task")
    if came_from == CALLERS_ROWS and Path(config.task).stem != CALLERS_ROWS:
        raise ValueError(
            f"{run_dir} was trained on rows given from Python, which are not kept; "
            "name a task with --task."
        )


def _write(path: Path, text: str) -> None:
    from grpo_jax.config.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def sample(
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
    """Print completions of a prompt, drawn and ended as in the run.

    Args:
      prompt: the text; a chat model sees it as the message of a user.
      model: hub name, folder or .gguf file; the embedded model by default.
      run_dir: or a run, whose policy is used.
      step: the checkpoint of the run, or best; the newest by default.
      samples: how many completions.
      temperature: of sampling; by default 0 (greedy) for one sample, else the run's, or
        1 for a model.
      max_new_tokens: completions are cut at this length; by default the run's, or what
        suits the model.
      seed: of the sampling.
    """
    _check_counts(samples=samples, max_new_tokens=max_new_tokens)
    from grpo_jax.reporting.text import escape_control_chars
    from grpo_jax.training.evaluate import complete
    from grpo_jax.training.restore import open_policy

    if model is None and run_dir is None:
        model = EMBEDDED
    policy = open_policy(run_dir=run_dir, model=model, step=step)
    _warn_of_strange(policy, [prompt])
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


def export(
    *,
    run_dir: Path,
    out: Path | None = None,
    step: int | Literal["best"] | None = None,
    adapter: bool = False,
) -> None:
    """Write a checkpoint of a run as a Hugging Face folder.

    Args:
      run_dir: the run.
      out: the folder; RUN_DIR/export by default, RUN_DIR/adapter for adapters.
      step: the checkpoint, or best; the newest by default.
      adapter: the adapters alone, for PEFT; else they are merged into the model.
    """
    if adapter:
        _export_adapter(run_dir, out or run_dir / "adapter", step)
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


def _export_adapter(
    run_dir: Path, folder: Path, step: int | Literal["best"] | None
) -> None:
    from grpo_jax.training.restore import restore_adapter
    from grpo_jax.weights.adapter import save_adapter

    found, adapter, config = restore_adapter(run_dir, step)
    save_adapter(folder, adapter, config)
    print(f"adapters of step {found} written to {folder}")


def plot(
    runs: tyro.conf.Positional[tuple[Path, ...]] = (),
    *,
    run_dir: tuple[Path, ...] = (),
    out: Path = Path("metrics.png"),
) -> None:
    """Draw the curves of one or more runs into one picture.

    Args:
      runs: directories of runs.
      run_dir: the same, as a flag.
      out: the PNG file.
    """
    from grpo_jax.reporting.plots import plot_runs

    plot_runs([*runs, *run_dir], out)
    print(f"written to {out}")


def report(run: tyro.conf.Positional[Path], *, out: Path | None = None) -> None:
    """Write one HTML page with the curves and completions of a run.

    Args:
      run: the directory of the run.
      out: the file; RUN/report.html by default.
    """
    from grpo_jax.reporting.page import write_report

    print(f"written to {write_report(run, out)}")


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {count}.")
