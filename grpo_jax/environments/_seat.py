"""One seat of play: an environment, or none, and the tools that go with it.

It lives where the environment lives, in the training process or in a worker process.
Whatever user code does, a call gives an answer; only Ctrl-C passes.
"""

import inspect
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from grpo_jax.environments._checked import (
    NonsenseError,
    checked_reward,
    checked_step,
    opening,
)
from grpo_jax.environments._generators import Draws, Stepped
from grpo_jax.environments._tools import Tool, by_name, json_schema, result_content
from grpo_jax.environments.base import TextEnvironment
from grpo_jax.environments.outcome import Failure

# Makes an environment: a class, or a function without arguments.
Factory = Callable[[], Any]
# The name of a factory; None where there is one for all rows.
Name = str | None

# Time in which an environment must be made. It may start a server or load a file.
OPEN_SECONDS = 600.0

# TRL calls plain functions on the main thread.
_THREAD_HINT = (
    "\nIt ran in a thread. What needs the main thread, such as `signal.alarm`, works "
    "with environments.isolate, which gives it a process of its own."
)
_NOT_TOOLS = ("reset", "get_reward")


@dataclass(frozen=True)
class Kit:
    """What a run gave: tools for all rows, and the makers of environments."""

    tools: tuple[Tool, ...]
    factories: Mapping[Name, Factory]


class UnknownToolError(ValueError):
    """The policy called a tool that there is not."""


class Act(NamedTuple):
    """Something to do at a seat."""

    kind: Literal["open", "describe", "reset", "tool", "step", "reward", "close"]
    name: str = ""  # of the tool
    arguments: Any = None  # of the tool; the row of a reset; the text of a step
    seed: int = 0  # of a reset


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What there is to know of the environments of one factory.

    Attributes:
      class_name: of the environment; "" without one.
      type_id: equal for environments of the same class.
      is_text: whether it answers texts.
      has_reward: whether its episodes have rewards of its own.
      async_tools: names of the tools that are.
      tools: names of the tools, the run's first.
      schemas: of the tools, in that order.
      columns: that `reset` takes; None for any.
      required: columns that `reset` needs.
    """

    class_name: str = ""
    type_id: str = ""
    is_text: bool = False
    has_reward: bool = False
    async_tools: frozenset[str] = frozenset()
    tools: tuple[str, ...] = ()
    schemas: tuple[dict[str, Any], ...] = ()
    columns: frozenset[str] | None = None
    required: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an act gave: a value, or why there is none."""

    value: Any = None
    failure: Failure | None = None
    seconds: float = 0.0
    interrupted: bool = False  # by Ctrl-C, in the middle of user code
    lost: bool = False  # its code may still run, so its seat must not be used again
    gone: bool = False  # the environment is gone with its process


class Seat:
    """Acts for one episode at a time; the environment is made by the act "open"."""

    def __init__(self, kit: Kit, name: Name) -> None:
        self._kit = kit
        self._factory = kit.factories.get(name)
        self._where = "the run" if name is None else f"environment {name!r}"
        self._tools = by_name(kit.tools, of=self._where)
        self.environment: Any = None

    def is_async(self, act: Act) -> bool:
        """Whether the act is a coroutine, to be awaited with `run_async`."""
        function = self._function(act)
        return function is not None and _is_async(function)

    def run(self, act: Act) -> Answer:
        """The answer of an act that is not `async`."""
        start = time.monotonic()
        try:
            value = self._begin(act)
            if inspect.isawaitable(value):
                raise NonsenseError(
                    f"{act.name or act.kind} returned an awaitable; declare it with "
                    "`async def`, so that it is awaited."
                )
            value = self._finish(act, value)
            return Answer(value=value, seconds=time.monotonic() - start)
        except BaseException as error:
            return failed(error, time.monotonic() - start)

    async def run_async(self, act: Act) -> Answer:
        """The answer of an act that is `async`.

        A reset has the global random generators to itself in each of its steps. Who
        runs the coroutine knows its time.
        """
        try:
            coroutine = self._begin(act)
            if act.kind == "reset":
                coroutine = Stepped(coroutine, Draws(act.seed).in_use)
            return Answer(value=self._finish(act, await coroutine))
        except BaseException as error:
            return failed(error)

    def _begin(self, act: Act) -> Any:
        """Calls the user's function: its value, or its coroutine."""
        function = self._function(act)
        match act.kind:
            case "open":
                self._open()
                return None
            case "describe":
                return self._kind()
            case "tool" if function is None:
                raise UnknownToolError(f"Tool {act.name} not found.")
            case "reset" | "step" if self._factory is not None and function is None:
                raise NonsenseError("the environment could not be made")
            case _ if function is None:  # no environment, or it has no such method
                return None
            case "tool":
                return function(**act.arguments)
            case "reset":
                return function(**self._columns(act))
            case "step":
                return function(act.arguments)
            case _:
                return function()

    def _finish(self, act: Act, value: Any) -> Any:
        """The value of a function, checked, and such that it can be sent."""
        match act.kind:
            case "tool":
                return result_content(value)
            case "reset":
                is_text = isinstance(self.environment, TextEnvironment)
                return opening(act.arguments, value, may_replace=is_text)
            case "step":
                return checked_step(value)
            case "reward":
                return checked_reward(value, of="get_reward")
            case "describe":
                return value
            case _:
                return None

    def _function(self, act: Act) -> Callable[..., Any] | None:
        environment = self.environment
        if act.kind == "tool":
            return self._tools.get(act.name)
        if environment is None:
            return None
        match act.kind:
            case "reset":
                return environment.reset
            case "step":
                return environment.step
            case "reward" if "get_reward" in _methods(environment):
                return environment.get_reward
            # A public `close` of another environment is a tool of the policy.
            case "close" if isinstance(environment, TextEnvironment):
                return environment.close
        return None

    def _open(self) -> None:
        if self._factory is None or self.environment is not None:
            return
        environment = self._factory()
        methods = _methods(environment)
        if "reset" not in methods:
            raise NonsenseError(
                f"environment_factory returned {environment!r:.80}, which has no "
                "method `reset`."
            )
        _check_reward(environment, methods)
        own = []
        if not isinstance(environment, TextEnvironment):
            _check_step(environment, methods)
            # By the class, since looking at an instance would evaluate properties.
            public = [n for n in methods if not n.startswith("_")]
            names = [name for name in public if name not in _NOT_TOOLS]
            own = [getattr(environment, name) for name in names]
        of = type(environment).__name__
        self._tools = by_name((*self._kit.tools, *own), of=of)
        self.environment = environment

    def _kind(self) -> Kind:
        environment = self.environment
        is_async = [n for n, tool in self._tools.items() if _is_async(tool)]
        shared: dict[str, Any] = {
            "tools": tuple(self._tools),
            "schemas": tuple(map(json_schema, self._tools.values())),
            "async_tools": frozenset(is_async),
        }
        if environment is None:
            return Kind(**shared)
        is_text = isinstance(environment, TextEnvironment)
        reset = inspect.signature(environment.reset).parameters.values()
        named = [p for p in reset if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in reset)
        required = {p.name for p in named if p.default is p.empty}
        return Kind(
            class_name=type(environment).__name__,
            type_id=f"{type(environment).__module__}.{type(environment).__qualname__}",
            is_text=is_text,
            has_reward=is_text or "get_reward" in _methods(environment),
            columns=None if takes_any else frozenset(p.name for p in named),
            required=frozenset(required - {"seed"}),
            **shared,
        )

    def _columns(self, act: Act) -> dict[str, Any]:
        columns = dict(act.arguments)
        if None not in self._kit.factories:  # it chose the factory
            columns.pop("environment", None)
        is_text = isinstance(self.environment, TextEnvironment)
        parameters = inspect.signature(self.environment.reset).parameters
        # A seed in the row is the task's own: the same for the whole group.
        if is_text or "seed" in parameters:
            columns.setdefault("seed", act.seed)
        return columns


class Patience:
    """How long the resets of a play may take that run one after another.

    Directly behind one that hung, a reset of the same factory has half of its time. So
    all that hang in a row take twice as long as one, however many they are. One that
    ends gives the next all of its time again.
    """

    def __init__(self) -> None:
        self._hung: dict[Name, int] = {}

    def limit(self, name: Name, limit: float | None) -> float | None:
        """Seconds for the next reset, of those that it would have alone."""
        return None if limit is None else limit * 0.5 ** self._hung.get(name, 0)

    def note(self, name: Name, failure: Failure | None) -> None:
        """What became of the last reset."""
        hung = failure is not None and failure.kind == "timeout"
        self._hung[name] = self._hung.get(name, 0) + 1 if hung else 0


def timed_out(seconds: float) -> Failure:
    """The failure of a call that took too long."""
    return Failure(
        kind="timeout",
        cause="timeout",
        message=f"No result within {seconds:.3g} s.",
        details=f"No result within {seconds:.3g} s.",
    )


def _check_reward(environment: Any, methods: list[str]) -> None:
    if "get_reward" not in methods:
        return
    try:
        inspect.signature(environment.get_reward).bind()
    except TypeError as error:
        raise NonsenseError(
            f"{type(environment).__name__}.get_reward must need no arguments, but is "
            f"called without them: {error}. What it needs can be kept in `self`."
        ) from error


def _check_step(environment: Any, methods: list[str]) -> None:
    if "step" in methods and not inspect.getdoc(environment.step):
        raise NonsenseError(
            f"{type(environment).__name__} has a method `step` without a docstring. If "
            "it answers texts, let the class inherit from "
            "grpo_jax.environments.TextEnvironment; if it is a tool of the policy, "
            "document it."
        )


def _methods(environment: Any) -> list[str]:
    return [n for n, _ in inspect.getmembers(type(environment), inspect.isfunction)]


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function)


def failed(error: BaseException, seconds: float = 0.0) -> Answer:
    """The answer of an act that raised an error."""
    if isinstance(error, KeyboardInterrupt):
        return Answer(interrupted=True, seconds=seconds)
    try:
        message = str(error)
    except Exception:  # an exception that cannot say what it is
        message = type(error).__name__
    invalid = isinstance(error, NonsenseError)
    is_ours = invalid or isinstance(error, UnknownToolError)
    details = message if is_ours else "".join(traceback.format_exception(error))
    on_main = threading.current_thread() is threading.main_thread()
    if not (is_ours or on_main) and "main thread" in message:
        details += _THREAD_HINT
    failure = Failure(
        kind="invalid" if invalid else "error",
        cause=type(error).__name__,
        message=message,
        details=details.rstrip(),
    )
    return Answer(failure=failure, seconds=seconds)
