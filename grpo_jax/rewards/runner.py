"""Rewards of a batch of completions: functions called, weighted, summed and counted.

Functions follow TRL's convention (see `reward_call`). None means "no reward": by TRL's
rule a completion leaves its group only when no function gave it any.
"""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from grpo_jax.config import RewardsConfig
from grpo_jax.rewards.convention import (
    Batch,
    Failure,
    Outcome,
    RewardCall,
    TrainerState,
    reward_call,
    reward_names,
)
from grpo_jax.rewards.in_process import LocalCalls
from grpo_jax.rewards.metrics import (
    ERROR,
    TIMEOUT,
    function_metrics,
    logged_metrics,
    merge_logged,
)
from grpo_jax.rewards.subprocess import Worker

_logger = logging.getLogger(__name__)

# Seconds that a completion has when it is scored by itself after its batch failed,
# unless an equal share of the time left is longer. Enough for the import of a library.
_RETRY_SECONDS = 2.0
# The time limit, seconds, of an isolated batch when none is given: without one a hang
# would hang the run, which isolation is there to prevent.
_ISOLATED_SECONDS = 60.0
# Share of completions from which on the failures of a function are told at every step.
_MOST = 0.9
# For what needs the main thread, such as `signal.alarm`.
_THREAD_HINT = (
    "\nIt ran in a thread, as async functions and those with rewards.timeout_seconds "
    "do. One that needs the main thread works with rewards.isolate, which gives it a "
    "process of its own."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Rewards of B completions; NaN means no reward."""

    rewards: Float[np.ndarray, "num_functions B"]  # float64, before weighting
    total: Float[np.ndarray, " B"]  # float64, the weighted sum
    failures: Int[np.ndarray, "num_functions B"]  # int8: 0, `ERROR` or `TIMEOUT`
    names: tuple[str, ...]  # of the functions
    logged: dict[str, list[float]]  # what functions logged, call by call
    extra: dict[str, list[Any]]  # columns that functions logged, for the completions

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers of these completions alone."""
        rewards = dict(zip(self.names, self.rewards, strict=True))
        failures = dict(zip(self.names, self.failures, strict=True))
        return function_metrics(rewards, failures) | logged_metrics([self.logged])


@dataclasses.dataclass(kw_only=True)
class _Result:
    """What one function gave for a batch, and on which completions it failed."""

    rewards: np.ndarray
    failures: np.ndarray
    extra: dict[str, list[Any]]
    metrics: dict[str, list[float]]
    causes: Counter[str] = dataclasses.field(default_factory=Counter)


class RewardRunner:
    """Calls reward functions on batches, in this process or in a worker process.

    `functions` take keyword arguments `prompts`, `completions`, `completion_ids`,
    `trainer_state`, `log_extra`, `log_metric` and one list per column; a function
    without `**kwargs` is given those it names. They may be `async`. Each returns one
    finite number, or None, per completion. Functions of the same name are told apart
    by a number (`names`).

    Failures, by `config`:

    - An exception ends the run (`on_error="raise"`), or costs the completion its reward
      (`"drop"`).
    - Beyond `timeout_seconds` for a batch, the same; what hangs goes on in a thread,
      which cannot be stopped.
    - With `isolate`, functions run one after another in a worker process, in 60 s a
      batch when no `timeout_seconds` are given. A hang, a crash and a lack of memory
      cost completions their reward, whatever `on_error`.

    After a failure that is not raised, the completions of the batch are scored again
    one by one, so that only offenders lose their reward. This takes at most another
    `timeout_seconds`, starts of processes aside; then the rest is dropped. After a
    time-out without `isolate` nothing is tried again, but for an async function that
    was late beside others: it may have been held up by one of them.

    Raises `ValueError` for no functions, a number of weights that is not theirs, and
    functions that cannot be called by keyword or be imported by the worker.
    """

    names: tuple[str, ...]

    def __init__(
        self,
        functions: Sequence[Callable[..., Any]],
        config: RewardsConfig,
        *,
        max_steps: int = 0,
    ) -> None:
        if not functions:
            raise ValueError("rewards need at least one reward function, got none.")
        if config.weights is not None and len(config.weights) != len(functions):
            raise ValueError(
                f"rewards.weights has {len(config.weights)} entries for "
                f"{len(functions)} reward functions; give one per function."
            )
        self.names = reward_names(functions)
        self._config = config
        self._timeout = config.timeout_seconds
        if self._timeout is None and config.isolate:
            self._timeout = _ISOLATED_SECONDS
        self._max_steps = max_steps
        self._weights = np.asarray(config.weights or [1.0] * len(functions), np.float64)
        self._calls: tuple[RewardCall, ...] = tuple(
            reward_call(function, name=name)
            for function, name in zip(functions, self.names, strict=True)
        )
        self._runner = (Worker if config.isolate else LocalCalls)(self._calls)
        self._logged: set[tuple[str, str]] = set()

    @property
    def may_log_metrics(self) -> bool:
        """Whether a function takes `log_metric`, and so may log any name."""
        return any(
            call.accepted is None or "log_metric" in call.accepted
            for call in self._calls
        )

    def check_columns(self, columns: Iterable[str], *, of: str = "the rows") -> None:
        """Raises `ValueError` naming a function that needs a column not among these.

        `of` says whose columns they are.
        """
        columns = tuple(columns)
        for call in self._calls:
            call.check_columns(columns, of=of)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        *,
        completion_ids: Sequence[Sequence[int]],
        step: int,
    ) -> Scores:
        """Returns the rewards of B completions; prompts and columns have B entries too.

        Completions are strings; with conversational prompts the functions see each as
        `[{"role": "assistant", "content": text}]`. Raises `ValueError` naming the
        function for values that are not one reward per completion, `RuntimeError` for
        its exceptions under `on_error="raise"`.
        """
        state = TrainerState(global_step=step, max_steps=self._max_steps)
        batch = _batch(prompts, completions, columns, completion_ids, state)
        self.check_columns(batch.columns)
        answers = self._runner.run_all(batch, timeout=self._timeout)
        results = [self._settled(i, batch, answer) for i, answer in enumerate(answers)]
        rewards = np.stack([result.rewards for result in results])
        total = np.nansum(rewards * self._weights[:, None], axis=0)
        total[np.isnan(rewards).all(axis=0)] = np.nan
        if np.isnan(total).all():
            self._tell_of_none(step)
        extra: dict[str, list[Any]] = {}
        for name, result in zip(self.names, results, strict=True):
            extra |= result.extra
            _tell_if_most_failed(name, result, step)
        return Scores(
            rewards=rewards,
            total=total,
            failures=np.stack([result.failures for result in results]),
            names=self.names,
            logged=merge_logged([result.metrics for result in results]),
            extra=extra,
        )

    def close(self) -> None:
        """Ends the worker process, or the event loop of async functions."""
        self._runner.stop()

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell_of_none(self, step: int) -> None:
        """Warns, once of steps and once of evaluations, that nothing has a reward."""
        kind = ("", "steps" if step else "evaluations")  # no function's name
        if kind not in self._logged:
            self._logged.add(kind)
            _logger.warning(
                "%s: no completion has a reward%s; further such %s are not told",
                _when(step),
                ", so it teaches nothing" if step else "",
                kind[1],
            )

    def _settled(self, index: int, batch: Batch, answer: Outcome | Failure) -> _Result:
        """The result of one function from its answer for the whole batch."""
        if isinstance(answer, Outcome):
            result = _empty_result(len(batch))
            result.rewards, result.extra = answer.rewards, answer.extra
            result.metrics = answer.metrics
            return result
        self._raise_if_fatal(index, answer)
        stuck = answer.kind == "timeout" and not self._config.isolate
        if stuck or len(batch) == 1:
            result = _empty_result(len(batch))
            self._drop(index, batch, answer, result, range(len(batch)))
            return result
        return self._one_by_one(index, batch)

    def _one_by_one(self, index: int, batch: Batch) -> _Result:
        """The result of a function that failed on the batch, from its completions."""
        budget = self._timeout
        result = _empty_result(len(batch))
        for number in range(len(batch)):
            single = batch.only(number)
            self._runner.start()  # a process that replaces one does so off the clock
            start = time.monotonic()
            answer = self._retry(index, single, left=len(batch) - number, budget=budget)
            if budget is not None:
                budget -= time.monotonic() - start
            if isinstance(answer, Outcome):
                result.rewards[number] = answer.rewards[0]
                for column, values in answer.extra.items():
                    filled = result.extra.setdefault(column, [None] * len(batch))
                    filled[number] = values[0]
                for name, values in answer.metrics.items():
                    result.metrics.setdefault(name, []).extend(values)
            else:
                self._raise_if_fatal(index, answer)
                self._drop(index, single, answer, result, [number])
        return result

    def _retry(
        self, index: int, single: Batch, *, left: int, budget: float | None
    ) -> Outcome | Failure:
        """The answer for one of the `left` completions that share `budget` seconds."""
        if budget is None or self._timeout is None:
            return self._runner.run(index, single, timeout=None)
        if budget <= 0.0:
            details = "No time was left to score it after others of its batch."
            return Failure(kind="timeout", cause="timeout", details=details)
        share = max(budget / left, min(_RETRY_SECONDS, self._timeout / 2.0))
        return self._runner.run(index, single, timeout=min(share, budget))

    def _raise_if_fatal(self, index: int, failure: Failure) -> None:
        name = self.names[index]
        if failure.kind == "invalid":
            raise ValueError(failure.details)
        survivable = failure.kind == "crash" or (
            failure.kind == "timeout" and self._config.isolate
        )
        if self._config.on_error == "drop" or survivable:
            return
        raise RuntimeError(
            f"reward function {name!r} failed: {failure.details}{_hint(failure)}\n"
            'rewards.on_error "drop" would go on without the reward.'
        ) from failure.exception

    def _drop(
        self,
        index: int,
        batch: Batch,
        failure: Failure,
        result: _Result,
        places: Sequence[int],
    ) -> None:
        """Notes completions that failed; logs the first failure of each kind."""
        result.failures[places] = TIMEOUT if failure.kind == "timeout" else ERROR
        result.causes[failure.cause] += len(places)
        kind = (self.names[index], failure.cause)
        if kind not in self._logged:
            self._logged.add(kind)
            _logger.warning(
                "reward function %r failed (%s); such completions get no reward, and "
                "further failures of this kind are only counted. %s%s\n"
                "Completion: %.2000r",
                *kind,
                failure.details,
                _hint(failure),
                batch.completions[0],
            )


def _batch(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    completion_ids: Sequence[Sequence[int]],
    state: TrainerState,
) -> Batch:
    """The batch that functions see, its lengths checked."""
    count = len(completions)
    if not count:
        raise ValueError("score needs at least one completion, got none.")
    lengths = {"prompts": len(prompts), "completion_ids": len(completion_ids)}
    lengths |= {f"column {name!r}": len(values) for name, values in columns.items()}
    for name, length in lengths.items():
        if length != count:
            raise ValueError(f"{name} has {length} entries for {count} completions.")
    if not isinstance(prompts[0], str):
        completions = [
            [{"role": "assistant", "content": text}] if isinstance(text, str) else text
            for text in completions
        ]
    return Batch(
        prompts=list(prompts),
        completions=list(completions),
        columns={name: list(values) for name, values in columns.items()},
        completion_ids=[np.asarray(ids, np.int64).tolist() for ids in completion_ids],
        state=state,
    )


def _empty_result(count: int) -> _Result:
    return _Result(
        rewards=np.full(count, np.nan),
        failures=np.zeros(count, np.int8),
        extra={},
        metrics={},
    )


def _hint(failure: Failure) -> str:
    """What to do where a function failed for running in a thread, by what it says."""
    return _THREAD_HINT if failure.in_thread and "thread" in failure.details else ""


def _when(step: int) -> str:
    return f"step {step}" if step else "evaluation"


def _tell_if_most_failed(name: str, result: _Result, step: int) -> None:
    """Warns, at every step, of a function that fails on nearly all completions."""
    count, failed = len(result.failures), np.count_nonzero(result.failures)
    if failed < _MOST * count:
        return
    causes = ", ".join(f"{number} {cause}" for cause, number in result.causes.items())
    _logger.warning(
        "%s: reward function %r failed on %d of %d completions (%s), which have no "
        "reward from it; the first failure of each kind is told in full",
        _when(step),
        *(name, failed, count, causes),
    )
