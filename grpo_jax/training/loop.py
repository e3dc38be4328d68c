"""`train`: prompts -> completions -> rewards -> update -> log -> save, until the end.

A step is a function of the state and the data position before it, so a run that is
killed and started again repeats the step it lost and ends in the same bits.
"""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.checkpointing.checksum import params_sha256
from grpo_jax.config import TrainConfig
from grpo_jax.config.files import to_jsonable, write_json
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.agreement import Agreement
from grpo_jax.parallel.processes import initialize_processes
from grpo_jax.reporting import metrics as names
from grpo_jax.reporting.console import Console
from grpo_jax.reporting.equal_groups import EqualGroups, taught_nothing
from grpo_jax.reporting.plots import plot_runs
from grpo_jax.reporting.trackers import make_tracker
from grpo_jax.rewards.source import changed_rewards
from grpo_jax.rollout.collect import Collector
from grpo_jax.rollout.rollout import Rollout
from grpo_jax.rollout.sampler import GroupSampler
from grpo_jax.tasks.base import RewardFunction, Row, Task
from grpo_jax.training import setup
from grpo_jax.training.learner import Learner
from grpo_jax.training.manifest import Origin, Record, Status, read_data
from grpo_jax.training.measures import Measures, slowest
from grpo_jax.training.preemption import GraceCheck, stop_requests
from grpo_jax.training.progress import Progress, TrainResult
from grpo_jax.training.reference import References
from grpo_jax.training.restore import load_policy
from grpo_jax.training.state import Batch, state_items, state_of
from grpo_jax.weights.pretrained import save_pretrained

# Updates in a row that may be skipped before the run stops.
MAX_SKIPPED = 5


def train(
    config: TrainConfig | None = None,
    *,
    dataset: Sequence[Row] | None = None,
    rewards: RewardFunction | Sequence[RewardFunction] | None = None,
    eval_dataset: Sequence[Row] | None = None,
) -> TrainResult:
    """Train a model by GRPO, or resume the run in `config.run_dir`.

    Args:
      config: the run; the embedded model on arithmetic by default.
      dataset: rows of the caller, dicts with "prompt" (a string or chat messages) and
        further columns, in place of `config.task`; `rewards` is then needed.
      rewards: functions ``f(prompts, completions, **columns) -> list[float | None]``.
      eval_dataset: held-out rows, on which the mean reward is measured.

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
    initialize_processes(config.mesh)
    with contextlib.ExitStack() as stack:
        agreement = Agreement()
        # First of all: until then a signal ends this process, or is lost on it.
        stack.enter_context(stop_requests(agreement))
        with agreement.phase("start"):
            task = setup.choose_task(config, dataset, rewards, eval_dataset)
            mesh, path, origin = setup.open_directory(config, task, stack)
        # Dates and commits are those of the first process.
        origin = Origin.read(meshes.gather_lists([origin.plain()])[0])
        with agreement.phase("load"):
            run = _Run(
                config, task, mesh, path, origin, agreement=agreement, stack=stack
            )
        return run.to_the_end()


class _Run:
    """A run in its directory: everything that is open while it goes on."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        mesh: Mesh,
        path: Path,
        origin: Origin,
        *,
        agreement: Agreement,
        stack: contextlib.ExitStack,
    ) -> None:
        self.config, self.task, self.mesh, self.path = config, task, mesh, path
        self.agreement = agreement
        self.first = jax.process_index() == 0
        runner = stack.enter_context(
            contextlib.closing(setup.make_runner(config, task))
        )
        self.tracker = make_tracker(config.report, path, enabled=self.first)
        stack.callback(self.tracker.close)
        self.console = stack.enter_context(
            Console(config.steps, config.report, enabled=self.first)
        )
        self.console.phase(f"loading {config.model}")
        self.policy = load_policy(config, mesh, origin)
        origin = dataclasses.replace(origin, commit=self.policy.commit)
        self.record = Record(path, config, mesh, origin, enabled=self.first)
        model, tokenizer = self.policy.model, self.policy.tokenizer
        self.sampler = sampler = GroupSampler(
            model, mesh, max_prompt_tokens=config.max_prompt_tokens
        )
        self.collector = Collector(
            sampler, model.config, tokenizer, task, runner, config, agreement=agreement
        )
        self.evaluate = setup.make_evaluation(
            self.policy,
            task,
            runner,
            config,
            mesh,
            sampler=sampler,
            agreement=agreement,
            announce=self.console.phase,
        )
        self.console.note(setup.describe_run(self.policy, task, mesh, path))
        for text in setup.warnings(self.policy, task):
            self.console.warning(text)
        self.compiles = stack.enter_context(names.CompileCounter())
        trained, base = self.policy.trained, self.policy.base
        self.learner = Learner(model, trained, self.policy.config, mesh, base=base)
        self.checkpoints = Checkpoints(
            path / "checkpoints", config.checkpoint, report=self.console.warning
        )
        stack.callback(self.checkpoints.abandon)
        warn = self.console.warning
        self.references = References(path / "references", config, report=warn)
        self.grace = GraceCheck(config.checkpoint.grace_seconds, report=warn)
        self.equal_groups = EqualGroups(report=warn)
        self.measures = Measures(model.config, config, mesh)
        self.progress = Progress()
        self.began = 0.0  # on the clock of `perf_counter`, less the starts before
        self.metrics: Mapping[str, Any] = {}  # of the newest step

    def to_the_end(self) -> TrainResult:
        """Resume, train what is left, write what stays."""
        self._check_data()
        self._resume()
        if self.first and self.progress.step < self.config.steps:
            # A run that was extended is not finished any more.
            (self.path / "summary.json").unlink(missing_ok=True)
        self._set_status("running")
        self.began = time.perf_counter() - self.progress.seconds
        try:
            if self.progress.step == 0:
                self._begin()
            while self.progress.step < self.config.steps and not self.agreement.stop:
                self._one_step()
            if self.progress.step < self.config.steps:
                return self._preempted()
            if self.progress.measured_at != self.progress.step:
                self._measured()  # it ends at a step that was to be one on the way
            return self._finished()
        except BaseException:
            self._set_status("failed")
            raise

    def _check_data(self) -> None:
        inputs = setup.describe_inputs(
            self.policy, self.task, self.config, self.collector
        )
        with self.agreement.phase("data"):
            self.record.check(setup.describe_data(self.task, self.config) | inputs)

    def _resume(self) -> None:
        there = self.checkpoints.steps()
        like = self.learner.release() if there else self.learner.state_on_devices()
        found = self.checkpoints.restore(state_items(like))
        if found is None:
            self.tracker.truncate_after(-1)
            return
        step, items, meta = found
        self.learner.set_state(state_of(items))
        self.references.restore_at(step, self.learner)
        self.progress = Progress.read(meta["progress"])
        # A run that was stopped before its first step measures the policy again.
        self.tracker.truncate_after(step or -1)
        self.console.start_at(step)
        self.console.note(setup.describe_resumed(step, self.config.steps))
        told = self.record.changed_machine()
        if (before := read_data(self.path).get("rewards")) is not None:
            told += changed_rewards(self.task.rewards, before)
        for text in told:
            self.console.warning(text)

    def _begin(self) -> None:
        metrics = self._measured()
        with self.agreement.phase("report"):
            if metrics:
                self._log(0, metrics)

    def _one_step(self) -> None:
        start = time.perf_counter()
        step = self.progress.step + 1
        collected = self._collect(step)
        if collected is None:
            return
        rollout, sampled, batch = collected
        self.console.phase("compiling, then updating")
        metrics = self.learner.update(batch)
        self._count_skipped(step, metrics)
        drawn = len(sampled.rows) * jax.process_count()
        self._advance(step=step, position=self.progress.position + drawn)
        metrics |= self._describe(rollout, sampled, metrics, start)
        if self._due(self.config.eval_every) or step == self.config.steps:
            metrics |= self._measured()
        self._report(step, rollout, batch, metrics)
        if self.progress.skipped >= MAX_SKIPPED:
            raise FloatingPointError(
                f"step {step}: {MAX_SKIPPED} updates in a row were not finite (loss "
                f"{metrics['loss']}, gradient norm {metrics['grad_norm']}). The last "
                "good checkpoint is kept; a lower learning rate is the usual remedy."
            )
        self.references.refresh_after(step, self.learner)
        # What is saved is where the run stands: nothing is added after it.
        self._advance(seconds=time.perf_counter() - self.began)
        if self._due(self.config.checkpoint.every) or step == self.config.steps:
            self._save()

    def _measured(self) -> dict[str, float]:
        """An evaluation of the policy as it is, which is kept as the newest one."""
        self._update_sampler()
        measured = self.evaluate()
        self.sampler.release()
        self.progress = self.progress.evaluated(measured)
        return measured

    def _update_sampler(self) -> None:
        variables = self.learner.sampler_variables()
        self.sampler.update(variables, version=self.progress.step)

    def _report(
        self, step: int, rollout: Rollout, batch: Batch, metrics: dict[str, float]
    ) -> None:
        rows = rollout.records(step, meshes.to_host(batch.advantages))
        ends = step == self.config.steps or self.progress.skipped >= MAX_SKIPPED
        written = self._due(self.config.report.completions_every) or step == 1 or ends
        rows = meshes.gather_lists(to_jsonable(rows, other=str)) if written else rows
        with self.agreement.phase("report"):
            if written:
                self.tracker.log_completions(rows, step)
            self._log(step, metrics)
            self.grace.check(metrics)
            self.equal_groups.check(step, metrics)
            shown = rows[step % len(rows)]
            self.console.sample(shown["prompt"], shown["completion"], shown["rewards"])

    def _collect(self, step: int) -> tuple[Rollout, Rollout, Batch] | None:
        """A rewarded rollout, all that was sampled and the batch; None on a stop."""
        at = {"step": step, "position": self.progress.position}
        self.console.phase("compiling, then sampling")
        self._update_sampler()
        if limit := self.config.objective.resample_limit:
            found = self.collector.informative(**at, limit=limit)
            self.sampler.release()
            if found is None:
                return None
            rollout, sampled = found
            start = time.perf_counter()
            batch = self.learner.score(rollout)
        else:
            rollout = self.collector.sample(**at)
            self.sampler.release()
            if self.agreement.stop:
                return None
            # The devices compute the reference while the host computes rewards.
            self.console.phase("compiling, then scoring and rewards")
            batch = self.learner.score(rollout)
            with self.agreement.phase("rewards"):
                rollout = sampled = self.collector.reward(rollout, step=step)
                start = time.perf_counter()
            if self.agreement.stop:
                return None
        batch = jax.block_until_ready(self.learner.with_advantages(batch, rollout))
        sampled.seconds["time/score"] = time.perf_counter() - start
        return rollout, sampled, batch

    def _describe(
        self,
        rollout: Rollout,
        sampled: Rollout,
        update: Mapping[str, float],
        start: float,
    ) -> dict[str, float]:
        """Numbers about the completions and the speed, over all processes."""
        own = sampled.seconds | {"time/step": time.perf_counter() - start}
        seconds = slowest(own | {"time/update": update["time/update"]})
        return {
            **seconds,
            **self.measures.of_step(sampled, rollout, seconds),
            **self.compiles.metrics(),
            "num_completions": self.progress.position * self.config.group_size,
        }

    def _count_skipped(self, step: int, metrics: Mapping[str, float]) -> None:
        skipped = self.progress.skipped + 1 if metrics["update_skipped"] == 1.0 else 0
        self._advance(skipped=skipped)
        if metrics["update_skipped"]:
            self.console.warning(
                f"step {step}: loss {metrics['loss']:.4g} and gradient norm "
                f"{metrics['grad_norm']:.4g} are not finite; the update was skipped"
            )

    def _preempted(self) -> TrainResult:
        saved = np.array([self.progress.step in self.checkpoints.steps()])
        # The first process removes old steps: what others see may be older.
        if not meshes.gather_rows(saved)[0]:
            self._save()
        self.checkpoints.close()
        self._set_status("preempted")
        self.console.note(
            f"stopped after step {self.progress.step}; the same command resumes"
        )
        return self._result("preempted")

    def _finished(self) -> TrainResult:
        self.checkpoints.close()
        result = self._result("finished")
        self.console.note("writing the results")
        params = meshes.to_first(result.params)
        with self.agreement.phase("results"):
            if self.first:
                write_json(self.path / "summary.json", result.summary)
                save_pretrained(
                    self.path / "export",
                    self.policy.pretrained(params),
                    sampling=self.policy.sampling,
                )
                plot_runs([self.path], self.path / "plots" / "metrics.png")
            self._set_status("finished")
        self.console.summary(result.summary)
        if text := taught_nothing(result.history):
            self.console.warning(text)
        return result

    def _result(self, status: Status) -> TrainResult:
        params = self.policy.merged(self.learner.params)
        summary = {
            "status": status,
            **self.progress.summary(finished=status == "finished"),
            "params_sha256": params_sha256(params),
        }
        return TrainResult(
            params=params,
            tokenizer=self.policy.tokenizer,
            run_dir=self.path,
            history=names.read_metrics(self.path) if self.first else [],
            summary=summary,
        )

    def _save(self) -> None:
        if not self.references.save_pending(self.learner):
            return  # a checkpoint without its reference could not be resumed
        self.tracker.flush()
        meta = {"progress": dataclasses.asdict(self.progress)}
        items = state_items(self.learner.state_on_devices())
        self.checkpoints.save(self.progress.step, items, meta, metrics=self.metrics)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics = metrics
        self.tracker.log(metrics, step)
        self.console.step(step, metrics)

    def _advance(self, **changes: Any) -> None:
        self.progress = dataclasses.replace(self.progress, **changes)

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.progress.step % every == 0

    def _set_status(self, status: Status) -> None:
        self.record.write(status, step=self.progress.step)
