"""What a run is made of: its task, its rewards and how it measures a policy."""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from grpo_jax.checkpointing.retention import best_mode
from grpo_jax.config import EMBEDDED, TrainConfig
from grpo_jax.models.limits import longest_prompt
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.agreement import Agreement
from grpo_jax.planning.memory import evaluation_batch
from grpo_jax.planning.programs import is_evaluated
from grpo_jax.reporting import metrics as names
from grpo_jax.reporting.logs import attach_log_file
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.rewards.source import describe_rewards
from grpo_jax.rollout.collect import Collector, score_rows
from grpo_jax.rollout.draw import policy_sampling
from grpo_jax.rollout.encoding import encode_prompt, encode_rows, prompts_sha256
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.tasks import load_task, task_from_rows
from grpo_jax.tasks.arithmetic import unknown_to_embedded
from grpo_jax.tasks.base import (
    RewardFunction,
    Row,
    Task,
    describe_held_out,
    first_rows,
    reward_functions,
)
from grpo_jax.training import run_dir as directories
from grpo_jax.training.evaluate import complete_share
from grpo_jax.training.manifest import Origin, read_manifest
from grpo_jax.training.restore import Policy
from grpo_jax.training.scores import Completed, is_judged, judge
from grpo_jax.training.scores import Evaluation as Judged
from grpo_jax.weights.folder import remove_unfinished
from grpo_jax.weights.pretrained import check_name

Evaluation = Callable[[], dict[str, float]]


def choose_task(
    config: TrainConfig,
    dataset: Sequence[Row] | None,
    rewards: RewardFunction | Sequence[RewardFunction] | None,
    eval_dataset: Sequence[Row] | None,
) -> Task:
    """The caller's own rows and rewards, or the task that `config` names.

    Raises:
      ValueError: if rows come without rewards, or the task cannot be loaded.
    """
    if dataset is None:
        if eval_dataset is not None:
            raise ValueError("eval_dataset needs a dataset; give both or neither.")
        task = load_task(config.task, data=config.data, seed=config.seed)
        if rewards is None:
            return task
        functions = reward_functions(rewards)
        return dataclasses.replace(task, rewards=functions, reward_weights=None)
    if rewards is None:
        raise ValueError("a dataset needs rewards: functions that score completions.")
    return task_from_rows(dataset, rewards, eval_rows=eval_dataset)


def open_directory(
    config: TrainConfig, task: Task, stack: contextlib.ExitStack
) -> tuple[Mesh, Path, Origin]:
    """The mesh of a run, its directory, which is now its own, and where it began.

    On processes other than the first nothing is claimed, and it begins now.

    Raises:
      ValueError: for a model that is not there, a mesh that does not fit, or the
        directory of another run.
    """
    check_name(config.model)
    mesh = meshes.make_mesh(config.mesh)
    meshes.check_processes(mesh, config.mesh.mode)
    meshes.check_batch(mesh, config)
    path = Path(config.run_dir or Path("runs") / file_name(task.name))
    path = path.expanduser()
    origin = Origin()
    if jax.process_index() == 0:
        stack.enter_context(directories.claim(path))
        remove_unfinished(path)
        directories.check_config(path, config, describe_data(task, config))
        origin = Origin.read(read_manifest(path))
        stack.enter_context(attach_log_file(path))
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(nn.logical_axis_rules(meshes.RULES))
    return mesh, path, origin


def describe_data(task: Task, config: TrainConfig) -> dict[str, Any]:
    """What a run learns from and is measured on, as far as no model is needed for it.

    Digests are those of up to 1,000 rows, evenly chosen, or of 3 where rows are made or
    read on demand; values that JSON does not know count by their type.
    """
    held_out = held_out_rows(task, config)
    return {
        "task": task.name,
        "rows": len(task.train),
        "rows_sha256": _rows_sha256(task.train),
        "test_rows": len(held_out),
        "test_rows_sha256": _rows_sha256(held_out),
        "rewards": describe_rewards(task.rewards),
    }


def describe_inputs(
    policy: Policy, task: Task, config: TrainConfig, collector: Collector
) -> dict[str, Any]:
    """What the model sees, and what it is at first; all processes must call it."""
    encoded = [
        encode_prompt(policy.tokenizer, row["prompt"])
        for row in held_out_rows(task, config)
    ]
    return {
        "prompts_sha256": collector.prompts_sha256(),
        "test_prompts_sha256": prompts_sha256(encoded),
        **policy.description(),
    }


def held_out_rows(task: Task, config: TrainConfig) -> Sequence[Row]:
    """The rows of each evaluation of a run; none if it has none."""
    return first_rows(task.test, _held_out(config, task))


def _rows_sha256(rows: Sequence[Row]) -> str:
    count = min(len(rows), 1000 if isinstance(rows, list | tuple) else 3)
    chosen = [dict(rows[i * len(rows) // count]) for i in range(count)]
    text = json.dumps(chosen, skipkeys=True, default=lambda value: str(type(value)))
    return hashlib.sha256(text.encode()).hexdigest()


def describe_resumed(step: int, steps: int) -> str:
    """Where a run goes on, or that it does not."""
    done = "; nothing is left to train, another run_dir starts anew"
    return f"resumed from step {step} of {steps}{done if step >= steps else ''}"


def describe_run(policy: Policy, task: Task, mesh: Mesh, path: Path) -> str:
    """One line on what runs where: model, devices, rows, the work of a step, folder."""
    config, devices = policy.config, mesh.devices.flat
    base, trained = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (policy.base, policy.trained)
    )
    adapters = f", {_millions(trained)} of them in adapters" if base else ""
    return (
        f"{config.model}, {_millions(base + trained)} parameters{adapters}, on "
        f"{mesh.size} x {devices[0].device_kind}; {task.name}, {len(task.train):,} "
        f"rows, {describe_held_out(task)}; a step: {config.prompts_per_step} prompts x "
        f"{config.group_size} completions of up to {config.max_new_tokens} "
        f"tokens; in {path}"
    )


def warnings(policy: Policy, task: Task) -> Iterator[str]:
    """What the user should hear before the first step, a line each."""
    if policy.warning is not None:
        yield policy.warning
    if policy.config.model != EMBEDDED:
        return
    prompts = [row["prompt"] for rows in (task.train, task.test) for row in rows]
    if text := unknown_to_embedded(prompts):
        yield f"{text} A model can learn only what it samples at times."


def _millions(count: int) -> str:
    millions = count / 1e6
    return f"{millions:,.0f}M" if millions >= 100 else f"{millions:.3g}M"


def file_name(task: str) -> str:
    """The name of a task as that of a folder."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(task).stem).strip("-.") or "run"


def make_runner(config: TrainConfig, task: Task) -> RewardRunner:
    """The reward functions of the task, called as `config` and the task ask for."""
    chosen = dataclasses.replace(
        config.rewards,
        weights=config.rewards.weights or task.reward_weights,
        isolate=config.rewards.isolate or task.isolate,
    )
    runner = RewardRunner(task.rewards, chosen, max_steps=config.steps)
    runner.check_columns(task.train[0])
    if _held_out(config, task) and not is_judged(task):
        runner.check_columns(task.test[0], of="the held-out rows")
    _check_best(config, task, runner)
    best_mode(config.checkpoint)  # which must be known before anything is saved
    return runner


def _check_best(config: TrainConfig, task: Task, runner: RewardRunner) -> None:
    """Raises ValueError for a metric by which this run has no best step."""
    name = config.checkpoint.keep_best
    known = [names.REWARD, "loss", names.ENTROPY]
    if _held_out(config, task):
        known.insert(0, names.ACCURACY if is_judged(task) else names.EVAL_REWARD)
    if config.objective.kl_coef:
        known.append(names.KL)
    known += [f"rewards/{function}/mean" for function in runner.names]
    reserved = (name or "").startswith("eval/") or name in ("accuracy", names.KL)
    logged = runner.may_log_metrics and not reserved
    if name is None or name in known or logged:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
    raise ValueError(
        f"checkpoint.keep_best {name!r} is no metric of this run to choose by; {hint}"
    )


def make_evaluation(
    policy: Policy,
    task: Task,
    runner: RewardRunner,
    config: TrainConfig,
    mesh: Mesh,
    *,
    sampler: Sampler,
    agreement: Agreement,
    announce: Callable[[str], None],
) -> Evaluation:
    """What measures a policy on held-out prompts; it gives nothing if there are none.

    There are none where `eval_every` or `eval_prompts` is 0.

    Greedy accuracy where the task can tell right from wrong, else the mean reward.
    `announce` is told what begins.
    """
    rows = held_out_rows(task, config)
    if not rows:
        return dict
    model = policy.model.config
    batch = evaluation_batch(model, policy.config, mesh)
    sampling = policy_sampling(
        model, policy.tokenizer, config.sampling, temperature=0.0
    )
    prompts = encode_rows(
        policy.tokenizer,
        rows,
        limit=longest_prompt(
            config.max_prompt_tokens,
            new_tokens=config.max_new_tokens,
            context=model.max_position_embeddings,
        ),
        vocab_size=model.vocab_size,
    )

    def evaluate() -> dict[str, float]:
        start = time.perf_counter()
        announce(f"compiling, then evaluating {len(rows):,} held-out prompts")
        own = complete_share(
            sampler,
            policy.tokenizer,
            prompts,
            max_new_tokens=config.max_new_tokens,
            sampling=sampling,
            batch_size=batch,
        )
        share = meshes.own_share(len(rows))
        with agreement.phase("evaluation"):
            verdicts = _verdicts(own, rows[share], task, runner, batch)
        values = np.array(meshes.gather_lists(verdicts), np.float64)
        if is_judged(task):
            result = Judged(correct=values[:, None] == 1.0, completions=())
            metrics = {
                names.ACCURACY: result.accuracy,
                "eval/standard_error": result.standard_error,
            }
        else:
            given = values[~np.isnan(values)]
            mean = float(given.mean()) if given.size else math.nan
            metrics = {names.EVAL_REWARD: mean}
        return metrics | {"time/eval": time.perf_counter() - start}

    return evaluate


def _held_out(config: TrainConfig, task: Task) -> int:
    """How many rows the run measures itself on."""
    return min(config.eval_prompts, len(task.test)) if is_evaluated(config) else 0


def _verdicts(
    completed: Completed,
    rows: Sequence[Row],
    task: Task,
    runner: RewardRunner,
    batch: int,
) -> list[float]:
    """1 for right and 0 for wrong, or the reward, of one completion per row.

    Reward functions see up to `batch` of them at once: a time limit is one of a batch.
    """
    if not rows:
        return []
    if is_judged(task):
        judged = judge(completed, rows, task, lenient=False)
        return judged.correct[:, 0].astype(float).tolist()
    texts = [group[0] for group in completed.texts]
    ids = [group[0] for group in completed.ids]
    totals: list[float] = []
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        scores = score_rows(runner, rows[part], texts[part], ids[part], step=0)
        totals += scores.total.tolist()
    return totals
