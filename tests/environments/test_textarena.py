"""Games of the real library: same seed, same game, whatever else is played beside."""

import concurrent.futures
import pickle
import random
import sys

import numpy as np
import pytest

from grpo_jax.environments.textarena import textarena_environment

ta = pytest.importorskip("textarena")

# Each draws when it is reset, or as it is played, from `random` or from NumPy.
ALONE = {
    "GuessTheNumber-v0": ["[3]", "[17]", "no number", "[9]"],
    "2048-v0": ["[left]", "[up]", "[right]", "[down]", "[left]"],
    "Minesweeper-v0": ["[2 2]", "[7 7]"],
    "Sokoban-v0": ["[up]", "[left]", "[down]", "[right]"],
    "Bandit-v0": ["[red]", "[blue]", "[green]"],
    "Blackjack-v0": ["[hit]", "[stand]", "[hit]"],
}


def play(environment, seed, moves, **row):
    """All that is observed and rewarded, until the moves or the game end."""
    seen = [environment.reset(seed=seed, prompt="", **row)]
    for move in moves:
        random.random(), np.random.random()  # as others in the process do
        seen.append(environment.step(move))
        if seen[-1].done:
            break
    return seen


@pytest.mark.parametrize("name", ALONE)
def test_the_seed_decides_all_that_is_observed(name):
    factory = textarena_environment(name)
    used = factory()
    seen = play(used, 5, ALONE[name])
    play(used, 6, ALONE[name])
    assert play(used, 5, ALONE[name]) == play(factory(), 5, ALONE[name]) == seen
    assert len({str(play(factory(), seed, ALONE[name])) for seed in range(8)}) > 1


@pytest.mark.parametrize("name", ["2048-v0", "Blackjack-v0"])
def test_games_played_in_turns_do_not_disturb_each_other(name):
    factory, moves = textarena_environment(name), ALONE[name]
    alone = [play(factory(), seed, moves) for seed in (1, 2)]
    games = [factory(), factory()]
    seen = [[game.reset(seed=i + 1)] for i, game in enumerate(games)]
    for move in moves:
        for game, part in zip(games, seen, strict=True):
            if isinstance(part[-1], str) or not part[-1].done:
                random.random(), np.random.random()
                part.append(game.step(move))
    assert seen == alone


def quiet_play(environment, seed, moves):
    return [environment.reset(seed=seed), *map(environment.step, moves)]


def test_games_in_threads_do_not_disturb_each_other():
    factory, moves = textarena_environment("2048-v0"), ALONE["2048-v0"][:4]
    alone = [quiet_play(factory(), seed, moves) for seed in range(32)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as can be
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            games = pool.map(lambda s: quiet_play(factory(), s, moves), range(32))
            assert list(games) == alone
    finally:
        sys.setswitchinterval(interval)


def test_the_random_numbers_of_the_process_stay_as_they_are():
    random.seed(1), np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1), np.random.seed(1)
    quiet_play(textarena_environment("Sokoban-v0")(), 0, ["[up]"])
    assert (random.random(), np.random.random()) == expected


def test_each_message_is_read_once_and_own_moves_are_not():
    rules, *answers = play(textarena_environment("GuessTheNumber-v0")(), 0, ["[3]"] * 2)
    assert "between 1 and 20" in rules
    assert answers[0].observation == "The target number is higher."
    assert "already guessed" in answers[1].observation
    assert answers[0].reward == answers[1].reward == 0.0


def test_the_return_is_that_of_the_game():
    factory = textarena_environment("GuessTheNumber-v0", max_number=4)
    guesses = ["[1]", "[2]", "[3]", "[4]"]
    games = [play(factory(), seed, guesses) for seed in range(12)]
    assert [game[-1] for game in games] == [("", 1.0, True)] * 12
    assert {len(game) for game in games} == {2, 3, 4, 5}
    # Two invalid moves in a row end a game, after no guess at all with 0.0.
    assert play(factory(), 0, ["nothing"] * 3)[1:][-1] == ("", 0.0, True)


@pytest.mark.parametrize(
    ("name", "reward"),
    [
        # The nearest number at hand is 100: |532 - 100| / 1000 is missing.
        ("Countdown-v0", 1 - 0.432),
        ("Cryptarithm-v0", 0.0),
        ("Slitherlink-v0", 0.0),
        ("ThreeCardMonte-v0", 0.0),
    ],
)
def test_a_reward_that_changed_places_with_its_reason_is_found(name, reward):
    rules, answer, last = play(textarena_environment(name)(), 0, ["no", "no"])
    assert "invalid move" in answer.observation and "[no]" not in answer.observation
    assert last.done and last.reward == pytest.approx(reward)


def test_an_opponent_moves_until_it_is_the_policys_turn():
    read = []

    def opponent(text):
        read.append(text)
        free = text.rpartition("Available Moves")[2]
        return next(move for move in ("[8]", "[3]", "[7]") if move in free)

    factory = textarena_environment("TicTacToe-v0", opponent=opponent)
    sides = set()
    for seed in range(8):
        read.clear()
        seen = play(factory(), seed, ["[0]", "[1]", "[2]"])
        assert seen == play(factory(), seed, ["[0]", "[1]", "[2]"])
        assert all("Player" in text for text in read)
        sides.add("You are Player 1" in seen[0])
        assert seen[-1].done and seen[-1].reward == 1.0
    assert sides == {False, True}


def test_what_cannot_be_played_is_refused_by_name():
    with pytest.raises(ValueError, match="'GuessTheNumber-v0'"):
        textarena_environment("GuesTheNumber-v0")
    with pytest.raises(ValueError, match="'TicTacToe-v0' is a game for two"):
        textarena_environment("TicTacToe-v0")
    with pytest.raises(ValueError, match="for one player"):
        textarena_environment("GuessTheNumber-v0", opponent=str)
    with pytest.raises(ValueError, match="'Snake-v0' is not a game for one or two"):
        textarena_environment("Snake-v0")
    with pytest.raises(ValueError, match="cannot make .*max_numbers"):
        textarena_environment("GuessTheNumber-v0", max_numbers=3)


def test_factories_reach_another_process():
    factory = pickle.loads(pickle.dumps(textarena_environment("GuessTheNumber-v0")))
    assert isinstance(factory().reset(seed=0), str)
