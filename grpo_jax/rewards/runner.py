"""Rewards of a batch of completions: functions called, weighted, summed and counted.

Functions follow TRL's convention (see `convention`). None means "no reward": by TRL's
rule a completion leaves its group only when no function gave it any.
"""

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from grpo_jax.config import RewardsConfig
from grpo_jax.rewards._convention import (
    Failure,
    Outcome,
    RewardCall,
    RewardInputs,
    TrainerState,
    reward_call,
    reward_names,
)
from grpo_jax.rewards._in_process import LocalCalls
from grpo_jax.rewards._parts import joined
from grpo_jax.rewards._subprocess import Worker
from grpo_jax.rewards.metrics import ERROR, TIMEOUT, merge_logged
from grpo_jax.tasks.base import is_per_completion

_logger = logging.getLogger(__name__)

# Seconds for a completion that is scored alone after its batch failed, unless an equal
# share of the remaining time is longer. Enough for the import of a library.
_RETRY_SECONDS = 2.0
# The default time limit, in seconds, of an isolated call: without one a hang would
# hang the run, which isolation is there to prevent.
_ISOLATED_SECONDS = 60.0
_CODES = {"timeout": TIMEOUT}  # of failures; all others are `ERROR`
# A function that fails on this share of completions is reported at every step.
_MOST = 0.9

# What each function said of a part of a batch.
Part = list[Outcome]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Rewards of B completions; NaN means no reward."""

    rewards: Float[np.ndarray, "num_functions B"]  # float64, before weighting
    total: Float[np.ndarray, " B"]  # float64, the weighted sum
    failures: Int[np.ndarray, "num_functions B"]  # int8: 0, `ERROR` or `TIMEOUT`
    names: tuple[str, ...]  # of the functions
    logged: dict[str, list[float]]  # the numbers that functions logged, call by call
    # The columns that functions logged; `function/column` if several have the name.
    extra: dict[str, list[Any]]


class RewardRunner:
    """Calls reward functions on batches, in this process or in a worker process.

    `functions` take keyword arguments `prompts`, `completions`, `completion_ids`,
    `trainer_state`, `log_extra`, `log_metric` and one list per column; a function
    without `**kwargs` gets only those it names. They may be `async`. Each returns one
    finite number, or None, per completion. Functions of the same name get a number
    (`names`).

    Failures, by `config`:

    - An exception ends the run (`on_error="raise"`), or the completion has no reward
      (`"drop"`).
    - Beyond `timeout_seconds` for a call, the same. A function that hangs goes on in a
      thread, which cannot be stopped.
    - With `isolate`, functions run one after another in a worker process, in 60 s a
      call when no `timeout_seconds` are given. After a hang, a crash or a lack of
      memory, completions have no reward, whatever `on_error`.

    After a failure that is not raised, the completions of the batch are scored again
    one by one, so that only offenders lose their reward. This takes at most another
    `timeout_seconds`, without the starts of processes; then the rest is dropped. After
    a time-out without `isolate` nothing is retried, except an async function that was
    late beside others: one of them may have held it up.

    Raises `ValueError` for no functions, a wrong number of weights, and functions that
    cannot be called by keyword or be imported by the worker.
    """

    names: tuple[str, ...]
    is_per_completion: bool  # of every function
    is_isolated: bool  # whether they run in another process

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
        self._config, self.is_isolated = config, config.isolate
        self._timeout = config.timeout_seconds
        if self._timeout is None and config.isolate:
            self._timeout = _ISOLATED_SECONDS
        self._max_steps = max_steps
        self._weights = np.asarray(config.weights or [1.0] * len(functions), np.float64)
        self._calls: tuple[RewardCall, ...] = tuple(
            reward_call(function, name=name)
            for function, name in zip(functions, self.names, strict=True)
        )
        self._backend = (Worker if config.isolate else LocalCalls)(self._calls)
        self._logged: set[tuple[str, str]] = set()
        self.is_per_completion = all(map(is_per_completion, functions))

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
        batch = self.score_part(
            prompts, completions, columns, completion_ids=completion_ids, step=step
        )
        return self.join([batch], step=step)

    def score_part(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        *,
        completion_ids: Sequence[Sequence[int]],
        step: int,
        first: int = 0,
    ) -> Part:
        """What `score` does for a part of a batch; `join` makes its scores.

        A time limit applies to the part. One thread at a time may call this.

        Args:
          first: the number of the part's first completion within the batch.
        """
        state = TrainerState(global_step=step, max_steps=self._max_steps)
        inputs = _checked_inputs(prompts, completions, columns, completion_ids, state)
        self.check_columns(inputs.columns)
        inputs = dataclasses.replace(inputs, first=first)
        answers = self._backend.run_all(inputs, timeout=self._timeout)
        return [self._settle(i, inputs, answer) for i, answer in enumerate(answers)]

    def join(self, parts: Sequence[Part], *, step: int) -> Scores:
        """The scores of a batch, from its parts in order."""
        outcomes = [joined(of_function) for of_function in zip(*parts, strict=True)]
        rewards = np.stack([outcome.rewards for outcome in outcomes])
        total = np.nansum(rewards * self._weights[:, None], axis=0)
        total[np.isnan(rewards).all(axis=0)] = np.nan
        failures = np.zeros(rewards.shape, np.int8)
        loggers = Counter(column for outcome in outcomes for column in outcome.extra)
        extra: dict[str, list[Any]] = {}
        for name, codes, outcome in zip(self.names, failures, outcomes, strict=True):
            for column, values in outcome.extra.items():
                extra[column if loggers[column] == 1 else f"{name}/{column}"] = values
            for number, failure in outcome.failed.items():
                codes[number] = _CODES.get(failure.kind, ERROR)
        self._warn(step, outcomes, total)
        return Scores(
            rewards=rewards,
            total=total,
            failures=failures,
            names=self.names,
            logged=merge_logged([outcome.metrics for outcome in outcomes]),
            extra=extra,
        )

    def close(self) -> None:
        """Ends the worker process, or the event loop of async functions."""
        self._backend.stop()

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settle(
        self, index: int, inputs: RewardInputs, answer: Outcome | Failure
    ) -> Outcome:
        """The outcome of a function, from its answer for the whole batch."""
        if isinstance(answer, Outcome):
            return answer
        self._raise_if_fatal(index, answer)
        count = len(inputs)
        # A function that hung in a thread still occupies it, and would hang again.
        stuck = answer.kind == "timeout" and not self._config.isolate
        answers = [answer] * count
        if not stuck and count > 1:
            answers = self._one_by_one(index, inputs)
        outcome = Outcome(rewards=np.full(count, np.nan))
        for number, answer in enumerate(answers):
            if isinstance(answer, Outcome):
                outcome.rewards[number] = answer.rewards[0]
                for column, values in answer.extra.items():
                    filled = outcome.extra.setdefault(column, [None] * count)
                    filled[number] = values[0]
                for name, values in answer.metrics.items():
                    outcome.metrics.setdefault(name, []).extend(values)
                continue
            self._raise_if_fatal(index, answer)
            outcome.failed[number] = answer
            kind = (self.names[index], answer.cause)
            if kind not in self._logged:
                self._logged.add(kind)
                _logger.warning(
                    "reward function %r failed (%s); such completions get no reward, "
                    "and further failures of this kind are only counted. %s\n"
                    "Completion: %.2000r",
                    *kind,
                    answer.details,
                    inputs.completions[number],
                )
        return outcome

    def _one_by_one(
        self, index: int, inputs: RewardInputs
    ) -> Iterator[Outcome | Failure]:
        """The answers for single completions, which share the time of one batch."""
        left = total = math.inf if self._timeout is None else self._timeout
        for number in range(len(inputs)):
            if left <= 0.0:
                details = "No time was left to score it after others of its batch."
                yield Failure(kind="timeout", cause="timeout", details=details)
                continue
            self._backend.start()  # so that a new process starts off the clock
            share = left / (len(inputs) - number)
            limit = min(max(share, min(_RETRY_SECONDS, total / 2.0)), left)
            timeout = None if limit == math.inf else limit
            start = time.monotonic()
            answer = self._backend.run(index, inputs.only(number), timeout=timeout)
            left -= time.monotonic() - start
            yield answer

    def _raise_if_fatal(self, index: int, failure: Failure) -> None:
        if failure.kind == "invalid":
            raise ValueError(failure.details)
        survivable = failure.kind == "crash" or (
            failure.kind == "timeout" and self._config.isolate
        )
        if self._config.on_error == "drop" or survivable:
            return
        raise RuntimeError(
            f"reward function {self.names[index]!r} failed: {failure.details}\n"
            'rewards.on_error "drop" would go on without the reward.'
        ) from failure.exception

    def _warn(
        self, step: int, outcomes: Sequence[Outcome], total: Float[np.ndarray, " B"]
    ) -> None:
        """Warns of functions that fail on nearly all completions, and of no reward."""
        when = f"step {step}" if step else "evaluation"
        kind = ("", "steps" if step else "evaluations")  # "" is no function's name
        # Once for steps and once for evaluations.
        if np.isnan(total).all() and kind not in self._logged:
            self._logged.add(kind)
            _logger.warning(
                "%s: no completion has a reward%s; further such %s are not reported",
                when,
                ", so it teaches nothing" if step else "",
                kind[1],
            )
        for name, outcome in zip(self.names, outcomes, strict=True):
            if len(outcome.failed) < _MOST * len(total):
                continue
            causes = Counter(failure.cause for failure in outcome.failed.values())
            _logger.warning(
                "%s: reward function %r failed on %d of %d completions (%s), which "
                "have no reward from it; the first failure of each kind is logged in "
                "full",
                *(when, name, len(outcome.failed), len(total)),
                ", ".join(f"{number} {cause}" for cause, number in causes.items()),
            )


def _checked_inputs(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    completion_ids: Sequence[Sequence[int]],
    state: TrainerState,
) -> RewardInputs:
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
    return RewardInputs(
        prompts=list(prompts),
        completions=list(completions),
        columns={name: list(values) for name, values in columns.items()},
        completion_ids=[np.asarray(ids, np.int64).tolist() for ids in completion_ids],
        state=state,
    )
