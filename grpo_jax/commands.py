"""The commands that draw completions: `grpo-jax eval | sample | chat`."""

import contextlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grpo_jax.config import EMBEDDED, TrainConfig
from grpo_jax.environments.named import load_environment, load_tools

if TYPE_CHECKING:
    from grpo_jax.training.restore import Restored


def evaluate(
    *,
    run_dir: str | None = None,
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
    tools: tuple[str, ...] = (),
    environment: str | None = None,
) -> None:
    """Measure accuracy on held-out prompts, and print it as JSON.

    The strict accuracy requires the format of the task, the lenient one does not.

    Both are printed with their standard errors.

    With tools or environments, mean reward and calls are printed as well.

    Args:
      run_dir: directory of the run that is evaluated.
      model: hub name, folder, .gguf file or embedded, instead of a run.
      task: arithmetic, gsm8k, gsm8k:boxed, reasoning_gym:NAME or a .jsonl file; by
        default that of the run, or arithmetic for a model, or the prompts of the
        environment.
      data: local file or folder with the task's rows; by default that of the run.
      step: the checkpoint of the run, or best; by default the newest.
      prompts: number of held-out prompts; by default all, or 100 of an environment.
      samples: completions per prompt; two or more also report pass@k and majority.
      temperature: temperature of sampling; by default 0 (greedy) for one sample, else
        that of the run, or 1 for a model.
      max_new_tokens: limit of a completion in tokens; by default that of the run, or
        one that suits the model.
      batch_size: completions sampled at once; by default the run's eval_batch_size, or
        128. Fewer need less memory. Completions of one prompt stay together.
      seed: seed of the sampling, and of episodes.
      out: also write the JSON to this file.
      completions: write every completion, whether it was cut and its result to this
        .jsonl file, those of several turns as lists of messages.
      tools: functions that the policy may call, each package.module:NAME or
        path/to/file.py:NAME.
      environment: class or function that makes environments to play in, named alike.
    """
    _check_counts(
        prompts=prompts,
        samples=samples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    from grpo_jax.config.files import to_json_line
    from grpo_jax.tasks import load_task
    from grpo_jax.tasks.base import describe_held_out
    from grpo_jax.training.evaluate import BATCH
    from grpo_jax.training.evaluate import evaluate as measure
    from grpo_jax.training.restore import open_policy

    policy = open_policy(run_dir=run_dir, model=model, step=step)
    config = policy.config
    played = _played(tools, environment)
    if task is None:
        data = data or config.data
        task = _task_of(policy, run_dir, environment)
    sampling = policy.sampling(samples=samples, temperature=temperature)
    loaded = None
    if task is not None:
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
        environments=config.environments,
        # Weights are those of the run's own rewards.
        rewards=config.rewards if task in (None, config.task) else None,
        **played,
    )
    settings = {
        "model": config.model if run_dir is None else run_dir,
        "step": policy.step,
        "task": task,
        **({} if loaded is None else {"held_out": describe_held_out(loaded)}),
        **({"tools": tools} if tools else {}),
        **({} if environment is None else {"environment": environment}),
        "temperature": sampling.temperature,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    _write_results(settings | result.summary(), out)
    if completions is not None:
        rows = () if loaded is None else loaded.test
        lines = [to_json_line(record) + "\n" for record in result.records(rows)]
        _write(completions, "".join(lines))


def _write_results(values: dict[str, Any], out: Path | None) -> None:
    text = json.dumps(values, indent=2, allow_nan=False)
    print(text)
    if out is not None:
        _write(out, text + "\n")


def _task_of(
    policy: "Restored", run_dir: str | None, environment: str | None
) -> str | None:
    """The task that a policy was trained on; None if its environment made the prompts.

    As in training: the default task has nothing to do with an environment.
    """
    task = policy.config.task
    if environment is not None and task == TrainConfig().task:
        return None
    _check_stored(task, run_dir)
    return task


def _warn_of_unknown(policy: "Restored", prompts: Sequence[Any]) -> None:
    """Warn of prompts that the embedded model, unless trained by a run, cannot know."""
    from grpo_jax.tasks.arithmetic import unknown_to_embedded

    if policy.step is None and policy.config.model == EMBEDDED:
        if text := unknown_to_embedded(prompts):
            print(f"warning: {text}", file=sys.stderr)


def _check_stored(task: str, run_dir: str | None) -> None:
    """Raises ValueError for a run whose rows its configuration does not name."""
    from grpo_jax.tasks.base import CALLERS_ROWS
    from grpo_jax.training.restore import trained_task

    rows = None if run_dir is None else trained_task(run_dir)
    if rows == CALLERS_ROWS and Path(task).stem != CALLERS_ROWS:
        raise ValueError(
            f"{run_dir} was trained on rows given from Python, which are not stored; "
            "name a task with --task, or an environment that brings its prompts with "
            "--environment."
        )


def _write(path: Path, text: str) -> None:
    from grpo_jax.config.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def sample(
    *,
    prompt: str,
    model: str | None = None,
    run_dir: str | None = None,
    step: int | Literal["best"] | None = None,
    samples: int = 1,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    tools: tuple[str, ...] = (),
    environment: str | None = None,
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
      seed: seed of the sampling, and of episodes.
      tools: functions that the policy may call, each package.module:NAME or
        path/to/file.py:NAME.
      environment: class or function that makes environments to play in, named alike.
    """
    _check_counts(samples=samples, max_new_tokens=max_new_tokens)
    from grpo_jax.reporting.text import readable_text
    from grpo_jax.training.evaluate import complete
    from grpo_jax.training.restore import open_policy

    if model is None and run_dir is None:
        model = EMBEDDED
    policy = open_policy(run_dir=run_dir, model=model, step=step)
    if environment is None:
        _warn_of_unknown(policy, [prompt])
    played = _played(tools, environment)
    completions = complete(
        policy.model,
        policy.params,
        policy.tokenizer,
        [prompt],
        samples=samples,
        sampling=policy.sampling(samples=samples, temperature=temperature),
        max_new_tokens=max_new_tokens or policy.config.max_new_tokens,
        seed=seed,
        environments=policy.config.environments,
        **played,
    )
    # Completions of several turns are parted by an empty line.
    between = "\n\n" if played else "\n"
    print(between.join(map(readable_text, completions[0])))


def chat(
    *,
    model: str | None = None,
    run_dir: str | None = None,
    step: int | Literal["best"] | None = None,
    tools: tuple[str, ...] = (),
    environment: str | None = None,
    prompt: str | None = None,
    row: str | None = None,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> None:
    """Talk with a policy, or watch it play one episode of an environment.

    Without an environment, type a line for each turn; the end of input ends it.

    Args:
      model: hub name, folder or .gguf file; by default the embedded model.
      run_dir: directory of a run, instead of a model.
      step: the checkpoint of the run, or best; by default the newest.
      tools: functions that the policy may call, each package.module:NAME or
        path/to/file.py:NAME.
      environment: class or function that makes the environment, named alike.
      prompt: the prompt of the episode; by default empty, for an environment that
        brings its own.
      row: a JSON object with the columns that the environment reads.
      temperature: temperature of sampling; by default 0 (greedy).
      max_new_tokens: limit of an episode in tokens, by default that of the run, or one
        that suits the model; of a conversation, half the model's context, at most 4096.
      seed: seed of the episode, and of the sampling.
    """
    _check_counts(max_new_tokens=max_new_tokens)
    if environment is None and not (prompt is None and row is None):
        raise ValueError("--prompt and --row are of an episode; give --environment.")
    from grpo_jax.reporting.text import Messages, readable_text
    from grpo_jax.training.conversation import converse, play_episode
    from grpo_jax.training.restore import open_policy

    columns = _row(prompt, row)
    played = _played(tools, environment)
    if model is None and run_dir is None:
        model = EMBEDDED
    policy = open_policy(run_dir=run_dir, model=model, step=step)
    sampling = policy.sampling(temperature=temperature)

    def show(messages: Messages) -> None:
        print(readable_text(messages), flush=True)

    if environment is None:
        with contextlib.suppress(KeyboardInterrupt):
            converse(
                policy,
                _person,
                tools=played.get("tools"),
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                seed=seed,
                show=show,
            )
        return
    rewards = play_episode(
        policy,
        columns,
        sampling=sampling,
        max_new_tokens=max_new_tokens or policy.config.max_new_tokens,
        seed=seed,
        show=show,
        **played,
    )
    if rewards is None:
        show("(the environment failed, so there is no reward)")
        return
    for name, value in rewards.items():
        show(
            f"(reward {name}: {'none' if math.isnan(value) else format(value, '.4g')})"
        )


def _row(prompt: str | None, columns: str | None) -> dict[str, Any]:
    """The row of an episode; raises ValueError for columns that are no JSON object."""
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": prompt or ""}]}
    if columns is None:
        return row
    try:
        given = json.loads(columns)
    except ValueError as error:
        raise ValueError(f"--row is no JSON ({error}): {columns!r:.100}.") from error
    if not isinstance(given, dict):
        raise ValueError(f"--row must be a JSON object, got {columns!r:.100}.")
    return row | given


def _person() -> str | None:
    """The next line of a person that is not empty; None at the end of the input."""
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            line = input("user: " if typed else "").strip()
        except EOFError:
            return None
        if line:
            if not typed:  # so that the conversation is whole where it is written to
                from grpo_jax.reporting.text import readable_text

                print(readable_text([{"role": "user", "content": line}]), flush=True)
            return line


def _played(tools: Sequence[str], environment: str | None) -> dict[str, Any]:
    """What the policy plays with, as arguments; none without tools and environment."""
    if not tools and environment is None:
        return {}
    return {
        "tools": load_tools(tools),
        "environment_factory": load_environment(environment),
    }


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {count}.")
