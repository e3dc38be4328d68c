"""One call of one reward function: its arguments and its return value.

The convention is that of TRL's GRPOTrainer,
https://huggingface.co/docs/trl/grpo_trainer#using-a-custom-reward-function. The
training process and the worker process both use this module. It imports no JAX.
"""

import dataclasses
import functools
import inspect
import math
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

_LARGEST = float(np.finfo(np.float32).max)
# Columns that reward functions do not get: they get these values by other keywords.
_HIDDEN_COLUMNS = frozenset({"prompt", "completion", "completion_ids"})
_KEYWORDS = frozenset(
    {
        "prompts",
        "completions",
        "completion_ids",
        "trainer_state",
        "log_extra",
        "log_metric",
    }
)
_THREAD_HINT = (
    "\nIt ran in a thread, as functions do that are async, marked per_completion or "
    "called with rewards.timeout_seconds. One that needs the main thread works with "
    "rewards.isolate, which gives it a process of its own."
)
# Metrics that a run logs itself; with a slash, all names that begin so.
RESERVED_METRICS = frozenset(
    {
        *("step", "loss", "policy_loss", "kl", "entropy", "grad_norm"),
        *("learning_rate", "update_skipped", "num_completions"),
        *("reward", "reward_std", "frac_reward_zero_std"),
        *("rewards/", "completions/", "kept/", "eval/", "clip_ratio/"),
        *("importance_ratio/", "sampler_logp_diff/", "time/", "tokens_per_second/"),
        *("mfu/", "compile/", "rollout/", "tools/", "episodes/"),
    }
)
# Fields of a line in completions/step_*.jsonl.
RECORD_FIELDS = frozenset(
    {
        *("step", "prompt", "completion", "rewards", "reward", "advantage"),
        *("length", "finished", "turns", "calls", "failed_calls", "tool_seconds"),
        *("failed", "dropped_answers"),
    }
)


class InvalidRewards(ValueError):
    """A reward function returned or logged values that break the convention."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerState:
    """What reward functions see of the run, by TRL's names."""

    global_step: int  # the step that these completions belong to
    max_steps: int  # steps of the run; 0 when there is no run


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardInputs:
    """The completions of one call, with the prompt and columns of each."""

    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, list[Any]]
    completion_ids: list[list[int]]
    state: TrainerState
    first: int = 0  # the number of the first one in its batch, for messages

    def __len__(self) -> int:
        return len(self.completions)

    def only(self, index: int) -> "RewardInputs":
        """The inputs of one completion."""
        part = slice(index, index + 1)
        return RewardInputs(
            prompts=self.prompts[part],
            completions=self.completions[part],
            columns={name: values[part] for name, values in self.columns.items()},
            completion_ids=self.completion_ids[part],
            state=self.state,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a call returned no rewards."""

    kind: Literal["invalid", "error", "timeout", "crash"]
    cause: str  # failures of the same cause are logged once
    details: str  # for the log: a traceback, an exit code
    exception: BaseException | None = None  # None when it happened in the worker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The rewards of one function, and the values that it logged."""

    rewards: np.ndarray  # float64, NaN where there is no reward
    extra: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    metrics: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    # Completions, by number, on which the function failed.
    failed: dict[int, Failure] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardCall:
    """A reward function, with its signature read once."""

    function: Callable[..., Any]
    name: str
    accepted: frozenset[str] | None  # its keywords; None with **kwargs
    required: frozenset[str]
    is_async: bool

    def check_columns(self, columns: Iterable[str], *, of: str = "the rows") -> None:
        """Raises `ValueError` if it needs a column that is not there, `of` whom."""
        offered = (set(columns) - _HIDDEN_COLUMNS) | _KEYWORDS
        missing = sorted(self.required - offered)
        if missing:
            raise ValueError(
                f"reward function {self.name!r} needs {', '.join(missing)}, which {of} "
                f"do not have; it can be given {', '.join(sorted(offered))}."
            )

    def run(self, inputs: RewardInputs) -> Outcome | Failure:
        """Calls the function, which must not be `async`; raises only Ctrl-C."""
        try:
            outcome, keywords = self._prepare(inputs)
            return self._finish(outcome, self.function(**keywords), inputs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also sys.exit() in the function
            return _failure(error)

    async def run_async(self, inputs: RewardInputs) -> Outcome | Failure:
        """Awaits the function, which must be `async`; raises only Ctrl-C."""
        try:
            outcome, keywords = self._prepare(inputs)
            return self._finish(outcome, await self.function(**keywords), inputs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also a cancellation, by whomever
            return _failure(error)

    def _prepare(self, inputs: RewardInputs) -> tuple[Outcome, dict[str, Any]]:
        """An outcome that the loggers write to, and the keywords of the call."""
        outcome = Outcome(rewards=np.full(len(inputs), np.nan))

        def log_extra(column: str, values: Sequence[Any]) -> None:
            self._check_name("log_extra", column, RECORD_FIELDS.__contains__)
            if len(values) != len(inputs):
                raise InvalidRewards(
                    f"reward function {self.name!r} gave log_extra({column!r}) "
                    f"{len(values)} values for {len(inputs)} completions."
                )
            outcome.extra[column] = list(values)

        def log_metric(name: str, value: float) -> None:
            self._check_name("log_metric", name, is_reserved_metric)
            outcome.metrics.setdefault(name, []).append(float(value))

        keywords: dict[str, Any] = {
            name: list(values)
            for name, values in inputs.columns.items()
            if name not in _HIDDEN_COLUMNS
        }
        # Each function gets its own lists, so that it cannot change another's.
        keywords |= {
            "prompts": list(inputs.prompts),
            "completions": list(inputs.completions),
            "completion_ids": list(inputs.completion_ids),
            "trainer_state": inputs.state,
            "log_extra": log_extra,
            "log_metric": log_metric,
        }
        if self.accepted is not None:
            keywords = {k: v for k, v in keywords.items() if k in self.accepted}
        return outcome, keywords

    def _finish(self, outcome: Outcome, values: Any, inputs: RewardInputs) -> Outcome:
        count, first = len(inputs), inputs.first
        outcome.rewards[:] = checked_rewards(
            values, name=self.name, count=count, first=first
        )
        return outcome

    def _check_name(
        self, logger: str, name: Any, is_taken: Callable[[str], bool]
    ) -> None:
        if not isinstance(name, str):
            raise InvalidRewards(
                f"reward function {self.name!r} called {logger}({name!r:.80}, ...); "
                "the name must be a string."
            )
        if not is_taken(name):
            return
        mine = name.replace("/", "_")
        raise InvalidRewards(
            f"reward function {self.name!r} called {logger}({name!r}), a name that the "
            f"run itself uses; choose another one, for example 'my/{mine}'."
        )


def reward_call(function: Callable[..., Any], *, name: str) -> RewardCall:
    """Reads the signature of a reward function.

    A function without `**kwargs` later gets only the keywords that it names. Raises
    `ValueError` for one with a positional-only argument.
    """
    accepted: frozenset[str] | None = None
    required: frozenset[str] = frozenset()
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-in functions have no signature
        parameters = ()
    else:
        kinds = {parameter.kind for parameter in parameters}
        named = [
            p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in named):
            raise ValueError(
                f"reward function {name!r} has a positional-only argument; reward "
                "functions are called with keyword arguments."
            )
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            accepted = frozenset(p.name for p in named)
        required = frozenset(p.name for p in named if p.default is p.empty)
    call = getattr(function, "__call__", None)  # noqa: B004 - of an instance
    return RewardCall(
        function=function,
        name=name,
        accepted=accepted,
        required=required,
        is_async=any(map(inspect.iscoroutinefunction, (function, call))),
    )


def reward_names(functions: Sequence[Callable[..., Any]]) -> tuple[str, ...]:
    """A distinct name for each function: its own, or that of its class.

    Repeated names get a number: `accuracy`, `accuracy_2`.
    """
    names: list[str] = []
    for function in functions:
        while isinstance(function, functools.partial):
            function = function.func
        # Functions, methods and classes have a name; callable instances do not.
        base = getattr(function, "__name__", type(function).__name__)
        name, number = base, 2
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.append(name)
    return tuple(names)


def is_reserved_metric(name: str) -> bool:
    """Whether the run itself may log a metric of that name, so reward functions not."""
    head, slash, _ = name.partition("/")
    return head + slash in RESERVED_METRICS


def checked_rewards(
    values: Any, *, name: str, count: int, first: int = 0
) -> list[float]:
    """Returns the rewards as floats, NaN for None.

    Raises `InvalidRewards` naming the function unless there are exactly `count` of them
    in one dimension (a single one is not repeated), each a finite number, NaN or None.
    """
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        kind = type(values).__name__
        raise InvalidRewards(
            f"reward function {name!r} returned a {kind}; expected a list of {count} "
            "numbers, one per completion."
        )
    try:
        items = list(values)
    except TypeError as error:  # an array without dimensions
        raise InvalidRewards(
            f"reward function {name!r} returned a single number; expected a list of "
            f"{count}, one per completion."
        ) from error
    if len(items) != count:
        raise InvalidRewards(
            f"reward function {name!r} returned {len(items)} rewards; expected "
            f"{count}, one per completion."
        )
    return [_reward(item, name=name, index=i) for i, item in enumerate(items, first)]


def _reward(item: Any, *, name: str, index: int) -> float:
    if item is None:
        return math.nan
    where = f"reward function {name!r} returned {item!r:.80} for completion {index}"
    expected = "; expected a finite float32 number, or None for no reward."
    if isinstance(item, str | bytes) or np.ndim(item) != 0:
        raise InvalidRewards(where + expected)
    try:
        value = float(item)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRewards(where + expected) from error
    # Advantages are computed in float32, where a larger one would be infinite.
    if abs(value) > _LARGEST:
        raise InvalidRewards(where + expected)
    return value


def _failure(error: BaseException) -> Failure:
    if isinstance(error, InvalidRewards):
        return Failure(
            kind="invalid", cause="value", details=str(error), exception=error
        )
    details = "".join(traceback.format_exception(error)).rstrip()
    on_main = threading.current_thread() is threading.main_thread()
    # Such as `signal.alarm`, which raises in other threads and says so.
    if not on_main and "thread" in details:
        details += _THREAD_HINT
    return Failure(
        kind="error", cause=type(error).__name__, details=details, exception=error
    )
