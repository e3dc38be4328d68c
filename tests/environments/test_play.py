"""Episodes played in this process: turns, groups, failures, time limits, threads."""

import asyncio
import gc
import logging
import math
import random
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from grpo_jax.config import EnvironmentsConfig
from grpo_jax.environments import _steps
from grpo_jax.environments._local import LocalPlace
from grpo_jax.environments._seat import Act, Answer, Kit, Patience, timed_out
from grpo_jax.environments.base import Step, TextEnvironment
from grpo_jax.environments.host import Host
from grpo_jax.environments.outcome import Reply

sys.path.append(str(Path(__file__).parent))
import environment_examples as examples
from environment_examples import at_some_limit, call, results, says

END = says("the end")


def turn(play, episode, message):
    play.send(episode, message)
    return play.wait([episode])[episode]


def host_of(*tools, factory=None, **config):
    return Host(tools, factory, EnvironmentsConfig(**config))


def test_tools_answer_in_the_order_of_the_calls_until_a_turn_has_none():
    with host_of(examples.product, examples.later) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=2) as play:
            assert play.openings == [[{"role": "user", "content": "p"}]]
            calls = [call("later", a=5), call("product", a=3, b=4), call("later", a=6)]
            reply = turn(play, 0, says("I compute", *calls))
            assert reply.messages == (
                {"role": "tool", "name": "later", "content": "5"},
                {"role": "tool", "name": "product", "content": "12"},
                {"role": "tool", "name": "later", "content": "6"},
            )
            assert not reply.done
            assert turn(play, 0, END) == Reply(done=True)
            first, second = play.results()
    assert (first.turns, first.calls, first.failed_calls) == (2, 3, 0)
    assert set(first.seconds) == {"product", "later"} and first.failure is None
    assert (second.turns, second.calls, second.environment) == (0, 0, None)


def test_failed_calls_are_messages_of_trls_form_and_logged_once_per_kind(caplog):
    written = {"type": "function", "function": {"name": "product", "arguments": [3]}}
    with host_of(examples.product, examples.later, examples.trouble) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=2) as play:
            calls = [
                call("nothing"),
                call("nowhere"),
                call("trouble", what="raise"),
                call("product", a=3),
                call("later", b=1),
                call("trouble", what="leave"),
                {"type": "python", "name": "run"},
                written,
            ]
            for episode in range(2):
                found = results(turn(play, episode, says("", *calls)))
            # As str(exception) has it, for the errors of Python.
            assert found[:5] == [
                "{'error': 'Tool nothing not found.'}",
                "{'error': 'Tool nowhere not found.'}",
                "{'error': \"'no such thing'\"}",
                "{'error': \"product() missing 1 required positional argument: 'b'\"}",
                "{'error': \"later() got an unexpected keyword argument 'b'\"}",
            ]
            assert found[5:7] == [
                "{'error': 'bye'}",
                "{'error': 'Unsupported tool call type: python'}",
            ]
            assert "argument after ** must be a mapping" in found[7]
            result = play.results()[0]
    assert (result.calls, result.failed_calls, result.failure) == (8, 8, None)
    assert set(result.seconds) == {"product", "later", "trouble"}
    logged = [record.getMessage().split(";")[0] for record in caplog.records]
    assert sorted(logged) == [
        "later failed (TypeError)",
        "nothing failed (UnknownToolError)",
        "product failed (TypeError)",
        "trouble failed (KeyError)",
        "trouble failed (SystemExit)",
    ]


def test_lists_pass_as_they_are_and_images_are_errors():
    def picture() -> list:
        """Draw."""
        return [{"type": "image", "image": 0}]

    with host_of(examples.table, picture) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=1) as play:
            reply = turn(play, 0, says("", call("table", rows=2), call("picture")))
            assert reply.messages[0]["content"] == [(0, 0), (1, 1)]
            assert "type image cannot be shown" in reply.messages[1]["content"]


@pytest.mark.parametrize("most", [1, 2])
def test_as_many_rounds_of_calls_as_allowed_and_a_last_turn(most):
    """TRL executes that many rounds, and then the policy has one more turn."""
    with host_of(examples.product, max_tool_calling_iterations=most) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=1) as play:
            for _ in range(most):
                reply = turn(play, 0, says("", call("product", a=1, b=1)))
                assert not reply.done and len(reply.messages) == 1
            last = turn(play, 0, says("", call("product", a=1, b=1)))
            assert last == Reply(done=True)
            assert play.results()[0].calls == most


def test_a_text_environment_ends_with_the_last_turn_that_it_may_answer():
    with host_of(factory=examples.Echo, max_tool_calling_iterations=2) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=1) as play:
            assert not turn(play, 0, says("a")).done
            assert turn(play, 0, says("b")) == Reply(done=True)
            assert play.results()[0].rewards == {"Echo": 2.0}


def test_text_environments_have_rewards_by_turn_and_tools_beside():
    with host_of(examples.product, factory=examples.Echo) as host:
        with host.play([{"prompt": "p"}], seeds=[7], members=2) as play:
            assert play.openings[0] == [{"role": "user", "content": "p seed 7"}]
            reply = turn(play, 0, says("", call("product", a=2, b=2)))
            assert results(reply) == ["4"]
            first, other = (turn(play, episode, says("hey")) for episode in (0, 1))
            assert first == other and first.messages[0]["role"] == "user"
            reply = turn(play, 0, says("messages"))
            assert reply.messages == ({"role": "tool", "name": "t", "content": "c"},)
            assert turn(play, 0, says("bye")) == Reply(done=True)
            rewards = [result.rewards["Echo"] for result in play.results()]
    assert rewards == [1.5, 1.0]  # "hey" and "bye"; "hey"


def test_environments_have_methods_as_tools_and_their_own_reward():
    rows = [{"prompt": "p"}, {"prompt": [{"role": "user", "content": "q"}]}]
    with host_of(factory=examples.Count) as host:
        with host.play(rows, seeds=[1, 2], members=2) as play:
            targets = [int(o[0]["content"].split()[-1][:-1]) for o in play.openings]
            assert targets[0] != targets[1]
            for episode in (0, 2):
                message = says("", call("add", step=targets[episode // 2] - 1))
                turn(play, episode, message)
            turn(play, 0, says("", call("add", step=1)))
            play.send(0, END)
            found = play.results()
    assert [result.rewards["Count"] for result in found] == [1.0, 0.0, 0.0, 0.0]
    assert [result.environment.target for result in found] == np.repeat(
        targets, 2
    ).tolist()


def test_members_begin_alike_and_the_generators_are_left_alone():
    def openings(seeds):
        with host_of(factory=examples.Count) as host:
            with host.play([{}] * 2, seeds=seeds, members=3) as play:
                return [result.environment.target for result in play.results()]

    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.random()
    random.seed(3)
    np.random.seed(3)
    first = openings([1, 2**63 + 5])
    assert (random.random(), np.random.random()) == expected
    assert len(set(first[:3])) == len(set(first[3:])) == 1 and first[0] != first[3]
    assert openings([1, 2**63 + 5]) == first != openings([2, 1])


def test_async_resets_run_at_once_and_members_begin_alike():
    arrived = []

    class Later(examples.Count):
        async def reset(self, **row):
            first = random.random()
            arrived.append(self)
            while len(arrived) < 6:  # each waits for the others
                await asyncio.sleep(0)
            self.draws = first, random.random()
            return f"{self.draws}"

    with host_of(factory=Later) as host:
        with host.play([{}] * 2, seeds=[4, 5], members=3) as play:
            draws = [result.environment.draws for result in play.results()]
    assert len(set(draws)) == 2 and draws[:3] == [draws[0]] * 3


def test_a_seed_is_given_to_a_reset_that_names_it_unless_the_row_has_one():
    class Seeded:
        def reset(self, seed=None, **row):
            return f"{seed} {sorted(row)}"

    with host_of(factory=Seeded) as host:
        rows = [{"prompt": "p "}, {"prompt": "p ", "seed": "own"}]
        with host.play(rows, seeds=[11, 12], members=2) as play:
            texts = [opening[0]["content"] for opening in play.openings]
    assert texts == ["p 11 ['prompt']", "p own ['prompt']"]


def test_members_that_begin_differently_are_an_error_with_a_remedy():
    class Wild:
        def reset(self, **row):
            return str(random.SystemRandom().random())

    with host_of(factory=Wild) as host:
        with pytest.raises(ValueError, match="Wild began differently.*`seed`"):
            host.play([{}], seeds=[0], members=2)
        # One member has nobody to differ from.
        host.play([{}], seeds=[0], members=1).close()


def test_the_column_of_the_factory_is_taken_out_of_the_row():
    seen = []

    class Sees:
        def reset(self, **row):
            seen.append(row)

    row = {"prompt": "p", "answer": 3, "environment": "x"}
    for factory, expected in (
        ({"x": Sees}, {"prompt": "p", "answer": 3}),
        (Sees, row),
    ):
        with host_of(factory=factory) as host:
            host.play([row], seeds=[0], members=1).close()
        assert seen.pop() == expected


def test_async_tools_of_all_episodes_run_at_once():
    """Each waits until all have begun, so one after another they would never end."""
    count, begun = 40, []
    everybody = asyncio.Event()

    async def meet(number: int) -> int:
        """Wait for the others.

        Args:
            number: Whose call it is.
        """
        begun.append(number)
        if len(begun) == count:
            everybody.set()
        await everybody.wait()
        return number

    # More than the threads that there may be.
    with host_of(meet, tool_timeout_seconds=600.0, workers=1) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=count // 2) as play:
            for n in range(count // 2):
                play.send(n, says("", call("meet", number=n), call("meet", number=-n)))
            replies = play.wait(range(count // 2))
    assert [results(replies[n]) for n in replies] == [
        [str(n), str(-n)] for n in range(count // 2)
    ]


def test_plain_tools_run_in_as_many_threads_as_there_are_workers():
    barrier, lock, running, most = threading.Barrier(3), threading.Lock(), [], []

    def meet(number: int) -> int:
        """Wait for two others.

        Args:
            number: Whose call it is.
        """
        with lock:
            running.append(number)
            most.append(len(running))
        barrier.wait(600.0)
        with lock:
            running.remove(number)
        return number

    with host_of(meet, tool_timeout_seconds=600.0, workers=3) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=9) as play:
            for n in range(9):
                play.send(n, says("", call("meet", number=n)))
            replies = play.wait(range(9))
    assert [results(replies[n]) for n in range(9)] == [[str(n)] for n in range(9)]
    assert max(most) == 3


def test_sending_does_not_wait_and_others_are_answered_meanwhile():
    go = threading.Event()

    def wait() -> str:
        """Wait."""
        assert go.wait(600.0)
        return "went"

    with host_of(wait, examples.product, tool_timeout_seconds=600.0) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=2) as play:
            play.send(0, says("", call("wait")))
            play.send(1, says("", call("product", a=2, b=3)))
            with pytest.raises(ValueError, match="episode 0 awaits a reply"):
                play.send(0, END)
            assert results(play.wait([1])[1]) == ["6"]
            go.set()
            assert results(play.wait([0])[0]) == ["went"]
            with pytest.raises(ValueError, match="awaits no reply"):
                play.wait([0])
            assert turn(play, 0, END).done
            with pytest.raises(ValueError, match="episode 0 is over"):
                play.send(0, END)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_call_that_hangs_is_an_error_message_and_gives_its_thread_up(workers):
    def check(limit):
        config = {"tool_timeout_seconds": limit, "workers": workers}
        with host_of(examples.trouble, examples.product, **config) as host:
            with host.play([{"prompt": "p"}], seeds=[0], members=6) as play:
                for n in range(5):
                    play.send(n, says("", call("trouble", what="hang")))
                play.send(5, says("", call("product", a=3, b=3)))
                replies = play.wait(range(6))
                late = f"{{'error': 'No result within {limit:.3g} s.'}}"
                assert results(replies[5]) == ["9"]
                assert [results(replies[n]) for n in range(5)] == [[late]] * 5
                assert results(turn(play, 0, says("", call("product", a=2, b=2)))) == [
                    "4"
                ]
                found = play.results()
        assert [r.failed_calls for r in found] == [1, 1, 1, 1, 1, 0]
        assert found[0].failure is None and found[0].seconds["trouble"] >= limit

    at_some_limit(check)


def test_an_environment_where_code_may_still_run_is_not_used_again():
    def check(limit):
        with host_of(factory=examples.Door, tool_timeout_seconds=limit) as host:
            with host.play([{"word": "w"}], seeds=[0], members=2) as play:
                turn(play, 0, says("", call("trouble", what="hang")))
                first, second = play.results()
                assert first.failure is None  # the policy read the error
            with host.play([{"word": "w"}], seeds=[0], members=2) as play:
                again = [result.environment for result in play.results()]
        assert second.environment in again and first.environment not in again

    at_some_limit(check)


def test_an_async_call_that_hangs_is_cancelled_alone():
    cancelled = []

    async def hang() -> str:
        """Hang."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return ""

    async def stubborn() -> str:
        """Hang, and do not listen."""
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if cancelled:
                    return "late"

    def check(limit):
        cancelled.clear()
        with host_of(
            hang, stubborn, examples.later, tool_timeout_seconds=limit
        ) as host:
            with host.play([{"prompt": "p"}], seeds=[0], members=1) as play:
                calls = [call("stubborn"), call("later", a=1), call("hang")]
                found = results(turn(play, 0, says("", *calls)))
                assert [text.startswith("{'error': 'No") for text in found] == [
                    True,
                    False,
                    True,
                ]
        assert cancelled

    at_some_limit(check)


def test_an_async_call_that_never_pauses_does_not_end_those_to_come():
    release, begun = threading.Event(), threading.Event()

    async def block() -> str:
        """Block the event loop."""
        begun.set()
        release.wait(600.0)
        return ""

    def check(limit):
        begun.clear()
        with host_of(block, examples.later, tool_timeout_seconds=limit) as host:
            with host.play([{"prompt": "p"}], seeds=[0], members=3) as play:
                play.send(0, says("", call("block")))
                assert begun.wait(600.0)
                # Nothing of these began, so they run on another loop.
                for n in (1, 2):
                    play.send(n, says("", call("later", a=n)))
                replies = play.wait(range(3))
                assert "No result within" in results(replies[0])[0]
                assert [results(replies[n]) for n in (1, 2)] == [["1"], ["2"]]

    at_some_limit(check)
    release.set()


def test_what_was_in_the_middle_when_the_loop_was_blocked_says_who_did_it():
    release, begun = threading.Event(), threading.Event()

    async def block() -> str:
        """Block the event loop, once another call waits there."""
        while not begun.is_set():
            await asyncio.sleep(0)
        release.wait(600.0)
        return ""

    async def wait() -> str:
        """Wait for ever."""
        begun.set()
        await asyncio.Event().wait()
        return ""

    def check(limit):
        begun.clear()
        with host_of(block, wait, tool_timeout_seconds=limit) as host:
            with host.play([{"prompt": "p"}], seeds=[0], members=2) as play:
                play.send(0, says("", call("wait")))
                play.send(1, says("", call("block")))
                replies = play.wait(range(2))
                assert "block never paused" in results(replies[0])[0]
                assert "No result within" in results(replies[1])[0]

    at_some_limit(check)
    release.set()


@pytest.mark.parametrize(
    "what", ["raise", "leave", "bad reward", "bad type", "bad message"]
)
def test_a_step_that_fails_costs_its_own_episode_its_reward(what, caplog):
    with host_of(factory=examples.Echo) as host:
        with host.play([{}], seeds=[0], members=3) as play:
            for episode in (0, 1):
                assert turn(play, episode, says("fine")).messages
                assert turn(play, episode, says(what)) == Reply(done=True)
            assert turn(play, 2, says("fine")).messages
            found = play.results()
        # A broken environment is not used again, and closed.
        closed = examples.Echo.closed
        with host.play([{}], seeds=[0], members=3) as play:
            again = [result.environment for result in play.results()]
    kind = "invalid" if what.startswith("bad") else "error"
    assert [r.failure and r.failure.kind for r in found] == [kind, kind, None]
    rewards = [result.rewards["Echo"] for result in found]
    np.testing.assert_array_equal(rewards, [np.nan, np.nan, 1.0])
    assert found[2].environment in again and found[0].environment not in again
    assert examples.Echo.closed == closed + 3  # those of the second play
    (record,) = caplog.records
    assert record.getMessage().startswith("Echo.step failed (")
    assert record.levelno == logging.WARNING


def test_a_step_that_hangs_costs_its_own_episode():
    def check(limit):
        with host_of(factory=examples.Echo, tool_timeout_seconds=limit) as host:
            with host.play([{}], seeds=[0], members=2) as play:
                play.send(0, says("hang"))
                play.send(1, says("fine"))
                replies = play.wait(range(2))
                assert replies[0] == Reply(done=True) and replies[1].messages
                found = play.results()
        assert [r.failure and r.failure.kind for r in found] == ["timeout", None]
        assert math.isnan(found[0].rewards["Echo"])

    at_some_limit(check)


@pytest.mark.parametrize("value", ["raise", "nan", "text", "hang", None])
def test_a_reward_that_fails_costs_its_own_episode(value):
    class Judge:
        def reset(self, **row):
            self.value = "1.0"

        def judge(self, value: str) -> str:
            """Set what the reward will be.

            Args:
                value: It.
            """
            self.value = value
            return "set"

        async def get_reward(self):
            match self.value:
                case "raise":
                    raise OSError("no judge")
                case "hang":
                    await asyncio.Event().wait()
                case "text":
                    return "good"
                case "none":
                    return None
            return float(self.value)

    def check(limit):
        with host_of(factory=Judge, tool_timeout_seconds=limit) as host:
            with host.play([{}], seeds=[0], members=2) as play:
                turn(play, 0, says("", call("judge", value=value or "none")))
                first, second = play.results()
        kinds = {"raise": "error", "hang": "timeout", None: None}
        found = first.failure and first.failure.kind
        assert found == kinds.get(value, "invalid")
        assert math.isnan(first.rewards["Judge"])
        assert second.failure is None and second.rewards["Judge"] == 1.0

    at_some_limit(check)


@pytest.mark.parametrize("what", ["raise", "hang", "leave"])
def test_a_reset_that_fails_costs_its_group(what):
    def check(limit):
        with host_of(factory=examples.Echo, tool_timeout_seconds=limit) as host:
            rows = [{}, {"broken": what}, {}]
            with host.play(rows, seeds=[0, 1, 2], members=2) as play:
                kind = "timeout" if what == "hang" else "error"
                assert play.openings[1].kind == kind
                with pytest.raises(ValueError, match="episode 2 is over"):
                    play.send(2, says("fine"))
                for episode in (0, 1, 4, 5):
                    assert turn(play, episode, says("fine")).messages
                found = [result.failure is not None for result in play.results()]
        assert found == [False, False, True, True, False, False]

    before = random.getstate()
    at_some_limit(check)
    # A reset that hangs does not keep the generators.
    assert random.getstate() == before


def test_a_group_does_not_go_on_after_a_failed_reset():
    tried = []

    class Broken:
        def reset(self, n, **row):
            tried.append(n)
            raise OSError

    with host_of(factory=Broken) as host:
        host.play([{"n": 1}, {"n": 2}], seeds=[0, 1], members=3).close()
    assert tried == [1, 2]


def test_an_environment_that_cannot_be_made_costs_its_group(caplog):
    made = []

    class Fragile(examples.Count):
        def __init__(self):
            made.append(self)
            if len(made) == 4:
                raise OSError("no more")

    with host_of(factory=Fragile) as host:
        with host.play([{}] * 2, seeds=[0, 1], members=2) as play:
            # They are made at once: the fourth may be of either group.
            lost = [not isinstance(opening, list) for opening in play.openings]
            found = [result.failure is not None for result in play.results()]
    assert sorted(lost) == [False, True]
    assert found == [lost[0], lost[0], lost[1], lost[1]]
    logged = [record.getMessage().split(";")[0] for record in caplog.records]
    assert logged == ["Fragile.open failed (OSError)"]


def late_or_not(given):
    """An act that notes the limits of resets; late ones are given up at once."""

    async def act(place, seat, act, limit):
        if act.kind != "reset":
            return Answer()
        given.append((seat.name, limit))
        late = act.arguments["late"]
        return Answer(failure=timed_out(limit) if late else None, lost=late)

    return act


def resets(place, rows):
    """Groups of two members, by the names of their factories and whether they hang."""
    return [
        [
            (place.seat(name), Act("reset", arguments={"late": late}), 8.0)
            for _ in range(2)
        ]
        for name, late in rows
    ]


def test_resets_behind_one_that_hung_have_half_of_its_time(monkeypatch):
    given = []
    monkeypatch.setattr(LocalPlace, "act", late_or_not(given))
    place = LocalPlace(Kit((), {"a": examples.Echo, "b": examples.Echo}), 2)
    rows = [("a", 1), ("a", 1), ("b", 0), ("a", 1), ("a", 0), ("a", 1), ("a", 1)]
    found = asyncio.run(place.resets(resets(place, rows)))
    # A group ends with the first reset that hangs.
    assert [len(answers) for answers in found] == [1, 1, 2, 1, 2, 1, 1]
    limits = [8.0, 4.0, 8.0, 8.0, 2.0, 1.0, 8.0, 8.0, 4.0]
    assert given == list(zip("aabbaaaaa", limits, strict=True))
    # The next play begins anew.
    asyncio.run(place.resets(resets(place, [("a", 1)])))
    assert given[-1] == ("a", 8.0)


def test_without_a_limit_resets_have_none():
    patience = Patience()
    for _ in range(2000):
        patience.note(None, timed_out(1.0))
    assert patience.limit(None, None) is None and patience.limit(None, 8.0) == 0.0


def test_an_episode_has_a_time_of_its_own():
    def check(limit):
        config = {"episode_timeout_seconds": limit, "tool_timeout_seconds": None}
        with host_of(examples.trouble, examples.product, **config) as host:
            with host.play([{"prompt": "p"}], seeds=[0], members=2) as play:
                calls = [call("product", a=1, b=1), call("trouble", what="hang")]
                play.send(0, says("", *calls, call("product", a=1, b=1)))
                play.send(1, says("", call("product", a=1, b=1)))
                replies = play.wait(range(2))
                assert replies[0] == Reply(done=True)
                assert results(replies[1]) == ["1"]
                found = play.results()
        assert [r.failure and r.failure.kind for r in found] == ["timeout", None]
        assert found[0].calls == 2  # the third was not made

    at_some_limit(check)


def test_ctrl_c_in_a_tool_is_passed_on():
    def stop() -> str:
        """Stop."""
        raise KeyboardInterrupt

    async def stop_later() -> str:
        """Stop after a pause."""
        await asyncio.sleep(0)
        raise KeyboardInterrupt

    for tool in (stop, stop_later):
        with host_of(tool, examples.later) as host:
            with host.play([{"prompt": "p"}], seeds=[0], members=2) as play:
                play.send(0, says("", call(tool.__name__)))
                with pytest.raises(KeyboardInterrupt):
                    play.wait([0])
                assert results(turn(play, 1, says("", call("later", a=1)))) == ["1"]


def test_the_digest_is_that_of_what_was_observed():
    def digest(word, first="hey", seed=3, prompt="p"):
        with host_of(factory=examples.Echo) as host:
            with host.play([{"prompt": prompt}], seeds=[seed], members=2) as play:
                if word:
                    turn(play, 1, says(word))
                turn(play, 0, says(first))
                return play.digest()

    base = digest("you")
    assert digest("you") == base
    others = [digest("me"), digest("you", "ho"), digest("you", seed=4)]
    others += [digest("raise"), digest(""), digest("you", prompt="q")]
    assert len({base, *others}) == 7


def test_a_sync_function_that_gives_a_coroutine_is_an_error():
    def lazy() -> int:
        """Give a coroutine."""
        return examples.later(3)

    with host_of(lazy) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=1) as play:
            with pytest.warns(RuntimeWarning, match="never awaited"):
                found = results(turn(play, 0, says("", call("lazy"))))
                gc.collect()
    assert "declare it with `async def`" in found[0]


def test_a_tool_may_run_a_loop_and_one_for_the_main_thread_says_what_to_do(caplog):
    with host_of(examples.nested, examples.alarmed) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=1) as play:
            found = results(turn(play, 0, says("", call("nested"), call("alarmed"))))
    assert found[0] == "7" and "main thread" in found[1]
    assert "works with environments.isolate" in caplog.text


class Slow(TextEnvironment):
    """Its reset takes the columns by name, and its first message is a list."""

    async def reset(self, *, seed, prompt, **row):
        return [
            {"role": "system", "content": prompt},
            {"role": "user", "content": "go"},
        ]

    async def step(self, text):
        return Step(text, 1.0)


def test_messages_of_a_reset_take_the_place_of_the_prompt():
    with host_of(factory=Slow) as host:
        with host.play([{"prompt": "rules"}], seeds=[0], members=2) as play:
            assert [message["content"] for message in play.openings[0]] == [
                "rules",
                "go",
            ]
            assert results(turn(play, 0, says("x"))) == ["x"]


def test_tools_alone_share_threads():
    def thread() -> int:
        """Tell the thread."""
        return threading.get_ident()

    with host_of(thread) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=5) as play:
            say = says("", call("thread"), call("thread"))
            found = [result for n in range(5) for result in results(turn(play, n, say))]
    assert len(set(found)) == 1


def test_time_in_which_others_hold_the_loop_does_not_count():
    def check(limit):
        begun, ended = [], asyncio.Event()

        async def hold() -> str:
            """Hold the event loop for most of the time that a call has."""
            begun.append(1)
            time.sleep(0.6 * limit)
            if len(begun) == 4:
                ended.set()
            return "held"

        async def wait() -> str:
            """Wait for the last of them, and then for some turns of the loop."""
            await ended.wait()
            for _ in range(9):
                await asyncio.sleep(0)
            return "waited"

        with host_of(hold, wait, tool_timeout_seconds=limit) as host:
            with host.play([{"prompt": "p"}], seeds=[0], members=1) as play:
                calls = [call("wait"), *[call("hold")] * 4]
                found = results(turn(play, 0, says("", *calls)))
        assert found == ["waited"] + ["held"] * 4

    at_some_limit(check)


def test_a_call_is_charged_for_its_own_time_and_its_waiting(monkeypatch):
    now, go = [0.0], asyncio.Event()
    monkeypatch.setattr(_steps, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def waits():
        now[0] += 1.0
        await go.wait()
        now[0] += 2.0
        return Answer(value="waited")

    async def holds():
        now[0] += 100.0
        return Answer(value="held")

    async def passes():
        now[0] += 10.0  # while no call holds the loop
        go.set()

    async def together():
        steps = _steps.Steps(lambda number: None)
        calls = steps.run(1, waits(), 20.0), steps.run(2, holds(), None)
        return (await asyncio.gather(*calls, passes()))[:2]

    found = asyncio.run(together())
    # 1 + 2 and 100 of their own, and 10 in which both wait.
    assert [(one.value, one.seconds) for one in found] == [
        ("waited", 13.0),
        ("held", 110.0),
    ]


def test_all_calls_of_an_environment_run_in_its_own_thread_which_ends_with_it():
    class Store:
        """Refuses other threads than the one that made it, as SQLite does."""

        def __init__(self):
            self.thread, self.numbers = threading.get_ident(), []

        def reset(self, **row):
            assert threading.get_ident() == self.thread

        def put(self, n: int) -> str:
            """Store a number.

            Args:
                n: It.
            """
            assert threading.get_ident() == self.thread
            self.numbers.append(n)
            return threading.current_thread().name

        def get_reward(self):
            assert threading.get_ident() == self.thread
            return float(sum(self.numbers))

    def threads():
        return [t for t in threading.enumerate() if t.name == "environment"]

    before = len(threads())
    with host_of(factory=Store, workers=2) as host:
        with host.play([{}], seeds=[0], members=4) as play:
            for _ in range(5):
                for n in range(4):
                    play.send(n, says("", call("put", n=n)))
                replies = play.wait(range(4)).values()
                assert [results(reply) for reply in replies] == [["environment"]] * 4
            rewards = [result.rewards["Store"] for result in play.results()]
        assert rewards == [0.0, 5.0, 10.0, 15.0]
    del host, play, replies
    end = time.monotonic() + 600.0
    while len(threads()) > before:
        assert time.monotonic() < end
        gc.collect()


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([], 0.0), ([None], math.nan), ([None, 2.0], 2.0), ([0.5, None, 1.0], 1.5)],
)
def test_rewards_of_turns_are_summed_and_none_withholds_one(rewards, expected):
    class Game(TextEnvironment):
        def reset(self, *, seed, **row):
            self.rewards = list(rewards)

        def step(self, text):
            return Step("go on", self.rewards.pop(0))

    with host_of(factory=Game) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=1) as play:
            for _ in rewards:
                turn(play, 0, says("a"))
            (result,) = play.results()
    np.testing.assert_equal(result.rewards["Game"], expected)


def test_rewards_of_turns_too_large_together_cost_the_episode(caplog):
    class Game(TextEnvironment):
        def reset(self, *, seed, **row):
            self.large = True

        def step(self, text):
            return Step("go on", 3e38) if text == "much" else "nothing"

    with host_of(factory=Game) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=2) as play:
            for text in ("much", "much"):
                turn(play, 0, says(text))
            turn(play, 1, says("nothing"))
            found = play.results()
    assert [r.failure and r.failure.kind for r in found] == ["invalid", "invalid"]
    assert all(math.isnan(result.rewards["Game"]) for result in found)
    # Two kinds of nonsense of one call are both told.
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "6e+38" in "".join(told)


def test_a_turn_that_has_earned_nothing_yet_has_the_reward_0():
    class Game(TextEnvironment):
        def reset(self, *, seed, **row):
            return "go"

        def step(self, text):
            return Step("go on")

    with host_of(factory=Game) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=1) as play:
            turn(play, 0, says("a"))
            assert play.results()[0].rewards == {"Game": 0.0}
