"""Tools and environments of a run: what they are, and how they are played.

Two contracts are understood. That of TRL: tools are functions, and an environment is an
object with `reset(**row)`, whose other public methods are tools,
https://huggingface.co/docs/trl/grpo_trainer#agent-training. And `TextEnvironment`,
which answers texts.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from grpo_jax.config import EnvironmentsConfig
from grpo_jax.environments._isolated import IsolatedPlace
from grpo_jax.environments._local import LocalPlace
from grpo_jax.environments._pool import Pool
from grpo_jax.environments._seat import Factory, Kind, Kit, Name
from grpo_jax.environments._tools import Tool
from grpo_jax.environments.play import Play, Row


class Host:
    """Plays episodes with the tools and environments of a run.

    Args:
      tools: functions that the policy may call in every row.
      environment_factory: a class, or a function without arguments, that makes an
        environment; or several by name, and each row names its own in the column
        "environment".
      config: time limits, and where they run.

    Attributes:
      reward_names: of the rewards that environments give, each named after its class.

    Raises:
      ValueError: a tool without a schema, two tools of one name, an environment that
        cannot be made or lacks `reset`, or neither tools nor environments.
    """

    reward_names: tuple[str, ...]

    def __init__(
        self,
        tools: Iterable[Tool] = (),
        environment_factory: Factory | Mapping[str, Factory] | None = None,
        config: EnvironmentsConfig | None = None,
    ) -> None:
        config = config or EnvironmentsConfig()
        factories: dict[Name, Factory] = {}
        if isinstance(environment_factory, Mapping):
            factories = {**environment_factory}
        elif environment_factory is not None:
            factories = {None: environment_factory}
        if callable(tools):
            raise ValueError(f"tools must be a list of functions, got {tools!r:.80}.")
        for name, factory in factories.items():
            if not callable(factory):
                raise ValueError(
                    f"{_place(name)} must be a class, or a function without arguments "
                    f"that makes an environment, got {factory!r:.80}."
                )
        kit = Kit(tuple(tools), factories)
        if not (kit.tools or factories):
            raise ValueError("give tools, an environment_factory, or both; got none.")
        self._by_column = isinstance(environment_factory, Mapping)
        self._is_isolated = config.isolate
        make_place = IsolatedPlace if config.isolate else LocalPlace
        place = make_place(kit, config.workers)
        self._pool = Pool(place, config)
        try:
            for name in factories or (None,):
                self._probe(name, _place(name) if factories else "tools")
        except BaseException:
            self.close()
            raise
        self._kinds: Mapping[Name, Kind] = self._pool.kinds
        self._names = _reward_names(self._kinds.values())
        self.reward_names = tuple(self._names.values())

    @property
    def tools(self) -> tuple[str, ...]:
        """The names of all tools, each once."""
        names = (name for kind in self._kinds.values() for name in kind.tools)
        return tuple(dict.fromkeys(names))

    @property
    def has_environments(self) -> bool:
        """Whether there is more than tools."""
        return any(kind.class_name for kind in self._kinds.values())

    @property
    def columns(self) -> tuple[str, ...]:
        """What reward functions are given of the episodes, by name."""
        shown = self.has_environments and not self._is_isolated
        return ("environment_rewards", *(["environments"] if shown else []))

    def schemas(self, row: Row) -> list[dict[str, Any]]:
        """The JSON schemas of the tools of a row; empty if it has none.

        Raises:
          ValueError: the row names no environment of this run, or its environment's
            `reset` cannot take its columns.
        """
        return list(self._checked(row).schemas)

    def play(self, rows: Sequence[Row], *, seeds: Sequence[int], members: int) -> Play:
        """Begins `members` episodes of each row, all of them from the row's seed.

        Returns when all have begun. A reset that fails costs its group.

        Raises:
          ValueError: as `schemas`, or members of a group began differently.
        """
        if len(rows) != len(seeds) or members < 1:
            raise ValueError(
                f"play needs a seed for each row and at least one member, got "
                f"{len(rows)} rows, {len(seeds)} seeds and {members} members."
            )
        for row in rows:
            self._checked(row)
        return Play(
            self._pool,
            rows,
            [self._name(row) for row in rows],
            seeds=seeds,
            members=members,
            reward_names=self._names,
        )

    def check_rewards(self, functions: Iterable[Callable[..., Any]]) -> None:
        """Raises `ValueError` if one asks for `environments` in other processes."""
        for function in functions if self._is_isolated else ():
            parameters: Iterable[str] = ()
            with contextlib.suppress(ValueError):  # some built-in functions have none
                parameters = inspect.signature(function).parameters
            if "environments" in parameters:
                raise ValueError(
                    f"reward function {function!r:.80} takes `environments`, which "
                    "live in other processes. Set environments.isolate to False, or "
                    "give the environment a method `get_reward`."
                )

    def close(self) -> None:
        """Closes environments that are not tools, and ends threads and processes."""
        self._pool.close()

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _probe(self, name: Name, where: str) -> None:
        answer = self._pool.probe(name)
        if answer.failure is not None:
            failure = answer.failure
            error = ValueError(f"{where}: {failure.cause}: {failure.message}")
            error.add_note(failure.details)
            raise error
        if answer.interrupted:
            raise KeyboardInterrupt

    def _name(self, row: Row) -> Name:
        return row["environment"] if self._by_column else None

    def _checked(self, row: Row) -> Kind:
        named = row.get("environment")
        is_known = isinstance(named, str) and named in self._kinds
        if self._by_column and not is_known:
            raise ValueError(
                f"a row has the environment {named!r}; expected one "
                f"of {', '.join(map(repr, self._kinds))}, in the column `environment`."
            )
        kind = self._kinds[self._name(row)]
        if not kind.class_name:
            return kind
        columns = set(row) - ({"environment"} if self._by_column else set())
        unknown = set() if kind.columns is None else columns - kind.columns
        missing = kind.required - columns
        if unknown or missing:
            what = "cannot take" if unknown else "needs"
            names = ", ".join(map(repr, sorted(unknown or missing)))
            raise ValueError(
                f"reset of environment {kind.class_name} {what} {names}; it is called "
                f"with the columns of the row: {', '.join(sorted(columns))}. Write "
                "`def reset(self, **row)`, with those that it uses before `**row`."
            )
        return kind


def _place(name: Name) -> str:
    return "environment_factory" if name is None else f"environment {name!r}"


def _reward_names(kinds: Iterable[Kind]) -> dict[str, str]:
    """A distinct name of the rewards of each class of environments that has some."""
    names: dict[str, str] = {}
    for kind in kinds:
        if not kind.has_reward or kind.type_id in names:
            continue
        name, number = kind.class_name, 2
        while name in names.values():
            name, number = f"{kind.class_name}_{number}", number + 1
        names[kind.type_id] = name
    return names
