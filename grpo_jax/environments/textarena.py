"""Games of TextArena, https://github.com/LeonGuertler/TextArena; tested with 0.7.4.

Needs the extra `environments`.
"""

import contextlib
import difflib
import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from grpo_jax.environments.base import Step, TextEnvironment

# What the library puts before the reason of an invalid move that ends a game.
_INVALID_MOVE = "Invalid Move: "
# Games draw from the random numbers of the process: one game is moved at a time.
_ONE_AT_A_TIME = threading.Lock()


def textarena_environment(
    name: str,
    *,
    opponent: Callable[[str], str] | None = None,
    **options: Any,
) -> Callable[[], TextEnvironment]:
    """Returns a factory of environments that play the game of that name.

    The policy reads what the game tells it, each message once. Its text is its move.
    The return is the game's own, mostly between -1 and 1; a game that is cut off has 0.
    Rows need no columns: a row's prompt is what stands before the rules of the game.

    Games are deterministic given their seed, also where several are played at once:
    the library draws from the random numbers of the process, and each game here has
    its own. Other threads that draw from `random` at the same time disturb a game.
    One that hangs stops all others in its process: `environments.isolate` helps.

    Args:
      name: such as "GuessTheNumber-v0". What it says about observations ("-train",
        "-raw") makes no difference for the policy.
      opponent: of a game for two: gets all that it has observed so far, and returns its
        move, which must follow from that text. An agent of the library is one. The
        policy's side is drawn from the seed.
      options: of the game, such as `max_number=100`, which override those of the name.

    Raises:
      ValueError: for a game that is not known, cannot be made (some need an API key, or
        words that NLTK downloads), or needs other players.
    """
    registry = _library().envs.registration.ENV_REGISTRY
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"textarena has no game {name!r} among {len(registry)}.{hint}")
    players = _players(name, options)
    if players == 2 and opponent is None:
        raise ValueError(f"{name!r} is a game for two: give an opponent.")
    if players == 1 and opponent is not None:
        raise ValueError(f"{name!r} is a game for one player: give no opponent.")
    return functools.partial(TextArena, name, opponent, options)


class TextArena(TextEnvironment):
    """One game after the other; made by `textarena_environment`."""

    def __init__(
        self, name: str, opponent: Callable[[str], str] | None, options: dict[str, Any]
    ) -> None:
        self._name, self._opponent, self._options = name, opponent, options
        self._randomness = _Randomness(0)
        self._game: Any = None
        self._player = 0

    def reset(self, *, seed: int, **row: Any) -> str:
        """Begin a game; returns its rules, and the opponent's first move if any."""
        self._randomness = _Randomness(seed)
        players = 1 if self._opponent is None else 2
        self._player = random.Random(seed).randrange(players)
        with self._randomness.of_the_process():
            # A new one, as `reset` of the library's wrappers keeps what was observed.
            self._game = _library().make(self._name, **self._options)
            self._game.reset(num_players=players, seed=seed)
        if self._opponent_moves():
            raise ValueError(
                f"{self._name!r} was over before the policy's first move: its opponent "
                "lost by an invalid move, or won."
            )
        return self._observed()

    def step(self, text: str) -> Step:
        """The policy's move, and the opponent's; the reward is that of the game."""
        if self._move(text) or self._opponent_moves():
            return Step(reward=self._reward(), done=True)
        return Step(observation=self._observed(), reward=0.0)

    def _move(self, text: str) -> bool:
        with self._randomness.of_the_process():
            done, _ = self._game.step(text)
        return bool(done)

    def _opponent_moves(self) -> bool:
        """Lets the opponent move, if it is its turn; whether that ends the game."""
        while self._opponent is not None and self._to_move() != self._player:
            with self._randomness.of_the_process():
                _, observed = self._game.get_observation()
            # It may take long, as a model on a server does: others go on meanwhile.
            if self._move(self._opponent(observed)):
                return True
        return False

    def _to_move(self) -> int:
        return _unwrapped(self._game).state.current_player_id

    def _observed(self) -> str:
        """What the policy has not read yet, without its own moves."""
        with self._randomness.of_the_process():
            _, messages = _unwrapped(self._game).get_observation()
        move = _library().ObservationType.PLAYER_ACTION
        return "\n".join(
            message.strip()
            for sender, message, kind in messages
            # Countdown and others give sender, message and kind in another order.
            if sender is not move and (sender, kind) != (self._player, move)
        )

    def _reward(self) -> float:
        rewards, info = self._game.close()
        reward = rewards[self._player]
        if isinstance(reward, str):
            # The same games exchange the reward of an invalid move and its reason.
            reward = info[self._player]["reason"].removeprefix(_INVALID_MOVE)
        return float(reward)


class _Randomness:
    """Random numbers of one game, which stand in for those of the process."""

    def __init__(self, seed: int) -> None:
        self._python = random.Random(seed).getstate()
        self._numpy = np.random.RandomState(seed % 2**32).get_state()

    @contextlib.contextmanager
    def of_the_process(self) -> Iterator[None]:
        with _ONE_AT_A_TIME:
            theirs = random.getstate(), np.random.get_state()
            random.setstate(self._python)
            np.random.set_state(self._numpy)
            try:
                yield
            finally:
                self._python, self._numpy = random.getstate(), np.random.get_state()
                random.setstate(theirs[0])
                np.random.set_state(theirs[1])


def _players(name: str, options: dict[str, Any]) -> int:
    """How many players the game is for: 1 or 2. Plays none of it."""
    library = _library()
    states = {1: library.SinglePlayerState, 2: library.TwoPlayerState}
    # Some games print as they are made, and commands may write JSON to stdout.
    with _Randomness(0).of_the_process(), contextlib.redirect_stdout(sys.stderr):
        try:
            game = library.make(name, **options)
        except Exception as error:
            raise ValueError(
                f"textarena cannot make {name!r} with the options {options}: "
                f"{type(error).__name__}: {str(error).strip()[:500]}"
            ) from error
        problem: Exception | None = None
        for players, state in states.items():
            try:
                game.reset(num_players=players, seed=0)
            except Exception as error:  # also of another number of players
                problem = error
                continue
            if isinstance(_unwrapped(game).state, state):
                return players
    raise ValueError(
        f"{name!r} is not a game for one or two players; only those are played here."
    ) from problem


def _unwrapped(game: Any) -> Any:
    """The game without the wrappers that choose what is observed."""
    while isinstance(game, _library().Wrapper):
        game = game.env
    return game


def _library() -> Any:
    try:
        import textarena
    except ImportError as error:
        raise ValueError(
            "games of textarena need the textarena library: "
            "pip install 'grpo-jax[environments]'."
        ) from error
    return textarena
