"""`train`: prompts -> completions -> rewards -> update -> log -> save, until the end.

A step is a function of the state and the data position before it. A run that is killed
and started again therefore repeats the step it lost and ends in the same bits.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.checkpointing.checksum import params_sha256
from grpo_jax.config import TrainConfig
from grpo_jax.config.files import to_jsonable, write_json
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.agreement import Agreement
from grpo_jax.parallel.processes import initialize_processes
from grpo_jax.reporting.equal_groups import taught_nothing
from grpo_jax.reporting.metrics import read_metrics
from grpo_jax.reporting.plots import plot_runs
from grpo_jax.rewards.source import changed_rewards
from grpo_jax.rollout.dynamic_sampling import resample
from grpo_jax.rollout.rollout import Rollout
from grpo_jax.tasks.base import RewardFunction, Row
from grpo_jax.training._announce import describe_resumed
from grpo_jax.training._environments import EnvironmentFactory, Tools
from grpo_jax.training._manifest import Status, read_data
from grpo_jax.training._measures import slowest
from grpo_jax.training._merging import computed
from grpo_jax.training._preemption import stop_requests
from grpo_jax.training._run import Run, open_run
from grpo_jax.training.progress import Progress, TrainResult
from grpo_jax.training.state import Batch, state_items, state_of
from grpo_jax.weights.pretrained import save_pretrained

# Updates in a row that may be skipped before the run stops.
_MAX_SKIPPED = 5


def train(
    config: TrainConfig | None = None,
    *,
    dataset: Sequence[Row] | None = None,
    rewards: RewardFunction | Sequence[RewardFunction] | None = None,
    eval_dataset: Sequence[Row] | None = None,
    tools: Tools | None = None,
    environment_factory: EnvironmentFactory | None = None,
) -> TrainResult:
    """Train a model by GRPO, or resume the run in `config.run_dir`.

    Args:
      config: the run; the embedded model on arithmetic by default.
      dataset: rows of the caller, dicts with "prompt" (a string or chat messages) and
        further columns, instead of `config.task`; `rewards` is then needed.
      rewards: functions ``f(prompts, completions, **columns) -> list[float | None]``.
      eval_dataset: held-out rows, on which the mean reward is measured.
      tools: functions that the policy may call, see docs/environments.md.
      environment_factory: makes what completions play in, or a dict of such factories.

    Returns:
      What the run leaves, also in its directory.

    Raises:
      ValueError: for bad input, before anything is compiled.
      FloatingPointError: after several updates in a row that were not finite; the last
        good checkpoint stays.
      RuntimeError: where another process failed.
    """
    config = TrainConfig() if config is None else config
    if not isinstance(config, TrainConfig):
        raise ValueError(
            f"config must be a TrainConfig, got {config!r:.100}; as in "
            'train(TrainConfig(model="...", steps=100)).'
        )
    return run_to_end(
        config,
        with_params=True,
        dataset=dataset,
        rewards=rewards,
        eval_dataset=eval_dataset,
        tools=tools,
        environment_factory=environment_factory,
    )


def run_to_end(config: TrainConfig, *, with_params: bool, **inputs: Any) -> TrainResult:
    """As `train`, which explains the inputs; without `params` where nobody reads them.

    The merged parameters of a model with adapters take several times the memory of a
    base in 4 bits. For the export each is computed by itself.
    """
    initialize_processes(config.mesh)
    with contextlib.ExitStack() as stack:
        agreement = Agreement()
        # Handle signals first: one that comes earlier ends this process, or is lost.
        stack.enter_context(stop_requests(agreement))
        run = open_run(config, agreement, stack, **inputs)
        progress, metrics = _resume(run), {}
        if jax.process_index() == 0 and progress.step < config.steps:
            # A run that was extended is not finished any more.
            (run.path / "summary.json").unlink(missing_ok=True)
        run.record.write("running", step=progress.step)
        began = time.perf_counter() - progress.seconds
        step = progress.step
        try:
            if progress.step == 0:
                progress, metrics = _begin(run, progress)
            while progress.step < config.steps and not agreement.stop:
                step = progress.step + 1
                progress, metrics = _step(run, progress, metrics, began=began)
            if progress.step < config.steps:
                result = _stop(run, progress, metrics)
            else:
                if progress.measured_at != progress.step:
                    # `steps` was lowered to a step that was not evaluated.
                    progress, _ = _evaluate(run, progress)
                result = _finish(run, progress)
            params = computed(result.params) if with_params else None
            return dataclasses.replace(result, params=params)
        except BaseException:
            run.record.write("failed", step=step)
            raise


def _resume(run: Run) -> Progress:
    """Where the run goes on: after its newest checkpoint, or at the beginning."""
    learner, tracker, console = run.learner, run.tracker, run.console
    found, carry = None, run.collector.carry_over
    if run.checkpoints.steps():
        found = run.checkpoints.restore(
            state_items(learner.release()), more=None if carry is None else carry.like
        )
    if found is None:
        tracker.truncate_after(-1)
        return Progress()
    step, items, meta = found
    learner.set_state(state_of(items))
    run.references.restore_at(step, learner)
    if carry is not None and (again := carry.restore(items)):
        console.warning(
            f"the batch is split over other devices than before: {again} groups that "
            "had begun are drawn anew"
        )
    # A run that was stopped before its first step measures the policy again.
    tracker.truncate_after(step or -1)
    console.start_at(step)
    console.note(describe_resumed(step, run.config.steps))
    changes = run.record.changed_machine()
    if (before := read_data(run.path).get("rewards")) is not None:
        changes += changed_rewards(run.task.rewards, before)
    for text in changes:
        console.warning(text)
    return Progress.read(meta["progress"])


def _begin(run: Run, progress: Progress) -> tuple[Progress, dict[str, float]]:
    """The evaluation before the first step, as metrics of step 0."""
    progress, metrics = _evaluate(run, progress)
    with run.agreement.phase("report"):
        if metrics:
            _log(run, 0, metrics)
    return progress, metrics


def _step(
    run: Run, progress: Progress, before: dict[str, float], *, began: float
) -> tuple[Progress, dict[str, float]]:
    """One step, saved if that is due: where the run stands after it, and its metrics.

    A run that is asked to stop before the update abandons the step: it stays where it
    is, with the metrics `before`. `began` is the time at which the run began, had it
    never been interrupted.
    """
    config, start = run.config, time.perf_counter()
    step = progress.step + 1
    collected = _collect(run, progress)
    if collected is None:
        return progress, before
    rollout, sampled, batch = collected
    run.console.phase("compiling, then updating")
    metrics = run.learner.update(batch)
    if metrics["update_skipped"]:
        run.console.warning(
            f"step {step}: loss {metrics['loss']:.4g} and gradient norm "
            f"{metrics['grad_norm']:.4g} are not finite; the update was skipped"
        )
    progress = progress.after_step(
        drawn=len(sampled.rows) * jax.process_count(),
        skipped=metrics["update_skipped"] == 1.0,
    )
    own = sampled.seconds | {"time/step": time.perf_counter() - start}
    seconds = slowest(own | {"time/update": metrics["time/update"]})
    metrics |= seconds | run.measures.of_step(sampled, rollout, seconds)
    metrics["num_completions"] = progress.position * config.group_size
    if progress.is_due(config.eval_every) or step == config.steps:
        progress, measured = _evaluate(run, progress)
        metrics |= measured
    run.repeats.check(step, sampled.digest)
    _report(run, progress, rollout, batch, metrics)
    if progress.skipped >= _MAX_SKIPPED:
        raise FloatingPointError(
            f"step {step}: {_MAX_SKIPPED} updates in a row were not finite (loss "
            f"{metrics['loss']}, gradient norm {metrics['grad_norm']}). The last good "
            "checkpoint is kept; a lower learning rate is the usual remedy."
        )
    run.references.refresh_after(step, run.learner)
    # What is saved is where the run stands: nothing is added after it.
    seconds = time.perf_counter() - began
    progress = dataclasses.replace(progress, seconds=seconds)
    if step == config.steps or progress.is_due(config.checkpoint.every):
        _save(run, progress, metrics)
    return progress, metrics


def _collect(run: Run, progress: Progress) -> tuple[Rollout, Rollout, Batch] | None:
    """A rewarded rollout, all that was sampled and the batch; None on a stop."""
    at = {"step": progress.step + 1, "position": progress.position}
    run.console.phase("compiling, then sampling")
    if limit := run.config.objective.resample_limit:
        with _updated_sampler(run, progress):
            found = resample(run.collector, run.agreement, **at, limit=limit)
        if found is None:
            return None
        rollout, sampled = found
        start = time.perf_counter()
        batch = run.learner.score(rollout)
    else:
        with _updated_sampler(run, progress):
            rollout = run.collector.sample(**at)
        if run.agreement.stop:
            return None
        # The devices compute the reference while the host computes rewards.
        run.console.phase("compiling, then scoring and rewards")
        batch = run.learner.score(rollout)
        with run.agreement.phase("rewards"):
            rollout = sampled = run.collector.reward(rollout, step=at["step"])
            start = time.perf_counter()
        if run.agreement.stop:
            return None
    batch = jax.block_until_ready(run.learner.with_advantages(batch, rollout))
    sampled.seconds["time/score"] = time.perf_counter() - start
    return rollout, sampled, batch


def _evaluate(run: Run, progress: Progress) -> tuple[Progress, dict[str, float]]:
    """An evaluation of the policy as it is, which `progress` keeps as the newest."""
    with _updated_sampler(run, progress):
        metrics = run.evaluate()
    return progress.evaluated(metrics), metrics


@contextlib.contextmanager
def _updated_sampler(run: Run, progress: Progress) -> Iterator[None]:
    """Within it the sampler has the policy as it is; after it, no weights."""
    try:
        # Nothing else holds these variables: with `release` they are gone.
        run.sampler.update(run.learner.sampler_variables(), version=progress.step)
        yield
    finally:
        run.sampler.release()


def _report(
    run: Run,
    progress: Progress,
    rollout: Rollout,
    batch: Batch,
    metrics: dict[str, float],
) -> None:
    config, step = run.config, progress.step
    rows = rollout.records(step, meshes.to_host(batch.advantages))
    ends = step == config.steps or progress.skipped >= _MAX_SKIPPED
    written = progress.is_due(config.report.completions_every) or step == 1 or ends
    rows = meshes.gather_lists(to_jsonable(rows, other=str)) if written else rows
    with run.agreement.phase("report"):
        if written:
            run.tracker.log_completions(rows, step)
        _log(run, step, metrics)
        for check in run.checks:
            check(step, metrics)
        shown = rows[step % len(rows)]
        run.console.sample(shown["prompt"], shown["completion"], shown["rewards"])


def _log(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    run.tracker.log(metrics, step)
    run.console.step(step, metrics)


def _save(run: Run, progress: Progress, metrics: Mapping[str, float]) -> None:
    if not run.references.save_pending(run.learner):
        return  # without its reference a checkpoint could not be resumed
    run.tracker.flush()
    meta = {"progress": dataclasses.asdict(progress)}
    items = state_items(run.learner.state_on_devices())
    if (carry := run.collector.carry_over) is not None:
        items |= carry.state(version=progress.step)
    run.checkpoints.save(progress.step, items, meta, metrics=metrics)


def _stop(run: Run, progress: Progress, metrics: Mapping[str, float]) -> TrainResult:
    """Save where a run stands that was asked to stop."""
    saved = np.array([progress.step in run.checkpoints.steps()])
    # Only the first process removes old steps, so others may still see one of them.
    if not meshes.gather_rows(saved)[0]:
        _save(run, progress, metrics)
    run.checkpoints.close()
    run.record.write("preempted", step=progress.step)
    run.console.note(f"stopped after step {progress.step}; the same command resumes")
    return _result(run, progress, "preempted")


def _finish(run: Run, progress: Progress) -> TrainResult:
    """Write the results of a run that has made its last step."""
    run.checkpoints.close()
    run.console.note("writing the results")
    result = _result(run, progress, "finished")
    params = meshes.to_first(result.params)
    with run.agreement.phase("results"):
        if jax.process_index() == 0:
            write_json(run.path / "summary.json", result.summary)
            save_pretrained(
                run.path / "export",
                run.policy.pretrained(params),
                sampling=run.policy.sampling,
            )
            plot_runs([run.path], run.path / "plots" / "metrics.png")
        run.record.write("finished", step=progress.step)
    run.console.summary(result.summary)
    if text := taught_nothing(result.history):
        run.console.warning(text)
    return result


def _result(run: Run, progress: Progress, status: Status) -> TrainResult:
    params = run.policy.merged(run.learner.params)
    summary = {
        "status": status,
        **progress.summary(finished=status == "finished"),
        "params_sha256": params_sha256(params),
    }
    return TrainResult(
        params=params,
        tokenizer=run.policy.tokenizer,
        run_dir=run.place,
        history=read_metrics(run.path) if jax.process_index() == 0 else [],
        summary=summary,
    )
