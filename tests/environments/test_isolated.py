"""Environments and tools in worker processes: a loss costs its own episode only."""

import asyncio
import math
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from grpo_jax.config import EnvironmentsConfig
from grpo_jax.environments import _isolated, _steps, _worker
from grpo_jax.environments._channel import LostProcessError
from grpo_jax.environments._isolated import IsolatedPlace
from grpo_jax.environments._seat import Act, Answer, Kit, timed_out
from grpo_jax.environments.host import Host
from grpo_jax.environments.outcome import Reply

sys.path.append(str(Path(__file__).parent))
import environment_examples as examples
from environment_examples import at_some_limit, call, results, says

TOOLS = (examples.product, examples.later, examples.trouble, examples.process_id)


def host_of(*tools, factory=None, workers=1, **config):
    config = EnvironmentsConfig(isolate=True, workers=workers, **config)
    return Host(tools, factory, config)


def turn(play, episode, message):
    play.send(episode, message)
    return play.wait([episode])[episode]


def kinds(found):
    return [result.failure and result.failure.kind for result in found]


def test_isolated_episodes_are_those_played_here():
    factories = {"count": examples.Count, "door": examples.Door, "echo": examples.Echo}
    rows = [{"environment": name, "word": "w", "prompt": "p"} for name in factories]

    def played(isolate):
        config = EnvironmentsConfig(isolate=isolate, workers=2)
        with Host(TOOLS[:2], factories, config) as host:
            with host.play(rows, seeds=[1, 2, 3], members=2) as play:
                play.send(0, says("", call("add", step=2), call("nothing")))
                calls = [call("say", word="x"), call("later", a=1)]
                play.send(2, says("", *calls, call("say", word="w")))
                play.send(4, says("hey"))
                replies = play.wait([0, 2, 4])
                play.send(5, says("bad reward"))
                replies |= play.wait([5])
                found = play.results()
                schemas = [host.schemas(row) for row in rows]
                rewards = [list(result.rewards.values()) for result in found]
                rest = play.openings, replies, kinds(found), schemas, play.digest()
        return rewards, host.reward_names, *rest

    here, there = played(False), played(True)
    np.testing.assert_array_equal(here[0], there[0])
    assert here[1:] == there[1:]


def test_they_live_in_other_processes_kept_between_plays():
    tools = [examples.process_id, examples.alarmed, examples.nested]
    calls = [call(tool.__name__) for tool in tools]
    with host_of(*tools) as host:
        found = []
        for _ in range(2):
            with host.play([{"prompt": "p"}], seeds=[0], members=1) as play:
                found.append(results(turn(play, 0, says("", *calls))))
                assert play.results()[0].environment is None
    assert found[0] == found[1] and int(found[0][0]) != os.getpid()
    # On its main thread, where no event loop runs.
    assert found[0][1:] == ["on the main thread", "7"]


def test_work_is_shared_among_processes(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with host_of(examples.process_id, workers=32) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=4) as play:
            for n in range(4):
                play.send(n, says("", call("process_id")))
            found = {results(reply)[0] for reply in play.wait(range(4)).values()}
    assert len(found) == 2


@pytest.mark.parametrize("what", ["die", "hang"])
def test_a_lost_process_costs_the_episode_that_lost_it(what):
    def check(limit):
        config = {"tool_timeout_seconds": limit} if what == "hang" else {}
        with host_of(factory=examples.Echo, **config) as host:
            with host.play([{}], seeds=[5], members=3) as play:
                before = [results(turn(play, n, says("a"))) for n in range(3)]
                process = results(turn(play, 1, says("process")))
                # Those after it wait in the process that is lost.
                for episode, text in enumerate((what, "b", "b")):
                    play.send((episode + 1) % 3, says(text))
                replies = play.wait(range(3))
                assert replies[1] == Reply(done=True)
                after = [results(replies[n]) for n in (0, 2)]
                # They go on where they were, in another process.
                assert results(turn(play, 0, says("process"))) != process
                found = play.results()
            # The next play has as many environments as ever.
            with host.play([{}], seeds=[5], members=3) as play:
                again = [results(turn(play, n, says("a"))) for n in range(3)]
        assert kinds(found) == [None, "crash" if what == "die" else "timeout", None]
        rewards = [result.rewards["Echo"] for result in found]
        np.testing.assert_array_equal(rewards, [2.0, np.nan, 2.0])
        assert before == again
        assert [texts[0].split()[:2] for texts in after] == [["b", "2"]] * 2

    check(None) if what == "die" else at_some_limit(check, 1.0)


def test_a_tool_without_an_environment_only_fails_the_call():
    with host_of(*TOOLS) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=2) as play:
            play.send(0, says("", call("trouble", what="die"), call("later", a=4)))
            play.send(1, says("", call("product", a=2, b=2), call("later", a=5)))
            replies = play.wait(range(2))
            assert results(replies[0]) == [
                "{'error': 'The process died, exit code 3.'}",
                "4",
            ]
            assert results(replies[1]) == ["4", "5"]
            first, second = play.results()
    assert (first.failure, first.failed_calls, second.failed_calls) == (None, 1, 0)


def test_a_slow_method_costs_the_environment_unless_it_is_async():
    def check(limit):
        with host_of(factory=examples.Door, tool_timeout_seconds=limit) as host:
            with host.play([{"word": "w"}], seeds=[0], members=2) as play:
                dream = results(turn(play, 0, says("", call("dream"))))
                assert dream == [f"{{'error': 'No result within {limit:.3g} s.'}}"]
                assert results(turn(play, 0, says("", call("say", word="w"))))
                hang = says("", call("trouble", what="hang"))
                assert turn(play, 1, hang) == Reply(done=True)
                found = play.results()
        assert kinds(found) == [None, "timeout"]

    at_some_limit(check)


def test_async_tools_of_an_environment_survive_the_loss_by_another():
    rows = [{"word": "w"}]
    with host_of(factory=examples.Door) as host:
        with host.play(rows, seeds=[0], members=3) as play:
            assert results(turn(play, 1, says("", call("say", word="w")))) == ["open"]
            play.send(0, says("", call("trouble", what="die")))
            play.send(1, says("", call("say", word="x"), call("say", word="w")))
            play.send(2, says("", call("say", word="w")))
            replies = play.wait(range(3))
            assert replies[0] == Reply(done=True)
            assert results(replies[1]) == ["shut", "open"]
            assert results(replies[2]) == ["open"]
            assert kinds(play.results()) == ["crash", None, None]


def test_a_call_that_was_too_late_cannot_be_repeated_elsewhere():
    def check(limit):
        with host_of(factory=examples.Door, tool_timeout_seconds=limit) as host:
            with host.play([{"word": "w"}], seeds=[0], members=3) as play:
                late = results(turn(play, 0, says("", call("dream"))))
                assert late == [f"{{'error': 'No result within {limit:.3g} s.'}}"]
                say = says("", call("say", word="w"))
                assert [results(turn(play, n, say)) for n in range(2)] == [["open"]] * 2
                turn(play, 2, says("", call("trouble", what="die")))
                assert turn(play, 0, say) == Reply(done=True)
                assert results(turn(play, 1, say)) == ["open"]
                found = play.results()
        assert kinds(found) == ["crash", None, "crash"]

    at_some_limit(check, 1.0)


def test_an_environment_that_answers_otherwise_when_replayed_fails_alone(caplog):
    with host_of(factory=examples.Echo) as host:
        with host.play([{}], seeds=[5], members=4) as play:
            turn(play, 0, says("sound"))
            for episode in (1, 2):
                turn(play, episode, says("unseeded"))
            turn(play, 3, says("die"))
            replies = [turn(play, episode, says("more")) for episode in range(3)]
            assert [reply.done for reply in replies] == [False, True, True]
            found = play.results()
    assert kinds(found) == [None, "invalid", "invalid", "crash"]
    assert "seed of its reset" in found[1].failure.message
    told = [r for r in caplog.records if "not deterministic" in r.getMessage()]
    assert len(told) == 1


@pytest.mark.parametrize("what", ["die", "hang"])
def test_a_reset_that_loses_its_process_costs_its_group(what):
    def check(limit):
        with host_of(factory=examples.Echo, tool_timeout_seconds=limit) as host:
            rows = [{}, {"broken": what}, {}]
            with host.play(rows, seeds=[0, 1, 2], members=2) as play:
                kind = "crash" if what == "die" else "timeout"
                assert play.openings[1].kind == kind
                for episode in (0, 4):
                    assert turn(play, episode, says("fine")).messages
                found = kinds(play.results())
        assert found == [None, None, kind, kind, None, None]

    check(None) if what == "die" else at_some_limit(check, 1.0)


def test_resets_behind_one_that_ended_the_process_have_half_of_its_time(monkeypatch):
    given = []

    class Lost:
        """A channel whose process ends with a reset that is late."""

        lost = None

        @classmethod
        async def opened(cls, pickled):
            return cls()

        async def call(self, seat, name, act, limit):
            if self.lost is None:
                given.append(limit)
                if act.arguments["late"]:
                    self.lost = LostProcessError(seat, timed_out(limit))
            if self.lost is not None:
                raise self.lost
            return Answer()

        def kill(self):
            pass

    monkeypatch.setattr(_isolated, "Channel", Lost)
    place = IsolatedPlace(Kit((), {None: examples.Echo}), 1)

    def reset(*late):
        acts = [Act("reset", arguments={"late": one}) for one in late]
        groups = [[(place.seat(None), act, 8.0)] for act in acts]
        return asyncio.run(place.resets(groups))

    found = reset(True, True, False, True)
    assert [one.failure is None for (one,) in found] == [False, False, True, False]
    assert given == [8.0, 4.0, 2.0, 8.0]
    reset(True)
    assert given[-1] == 8.0


def test_async_calls_do_not_pay_for_plain_ones_of_their_process(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(_steps, "time", clock)
    monkeypatch.setattr(_worker, "time", clock)
    ours, theirs = multiprocessing.Pipe()

    def work() -> str:
        """Work for long."""
        now[0] += 100.0
        return "worked"

    async def wait() -> str:
        """Have the work done, and wait for it."""
        ours.send((2, 0, None, Act("tool", name="work", arguments={}), None))
        while not now[0]:
            await asyncio.sleep(0)
        return "waited"

    ours.send((1, 0, None, Act("tool", name="wait", arguments={}), 10.0))
    desk = _worker._Desk(Kit((work, wait), {}), theirs)
    with asyncio.Runner() as runner:
        desk.run(runner.run(desk.next_plain()))
        runner.run(asyncio.wait(desk._tasks))
    answers = {}
    while ours.poll():
        if isinstance(report := ours.recv(), tuple):
            answers[report[0]] = report[1]
    assert {number: one.value for number, one in answers.items()} == {
        1: "waited",
        2: "worked",
    }
    assert answers[1].seconds == 0.0


def test_what_cannot_be_sent_is_refused_by_name():
    def inner(a: int) -> int:
        """Do.

        Args:
            a: It.
        """
        return a

    with pytest.raises(ValueError, match=r"(?s)tool .*inner.*isolate to False"):
        host_of(inner)
    with pytest.raises(ValueError, match="environment 'x' cannot be isolated"):
        host_of(factory={"x": lambda: examples.Count()})


def test_rows_that_cannot_be_sent_fail_alone_and_results_are_shown():
    with host_of(factory=examples.Echo) as host:
        rows = [{"thing": lambda: 0}, {}]
        with host.play(rows, seeds=[0, 1], members=1) as play:
            assert play.openings[0].cause == "pickle"
            assert isinstance(play.openings[1], list)
    with host_of(examples.locks, examples.table) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=1) as play:
            calls = [call("locks"), call("table", rows=2)]
            reply = turn(play, 0, says("", *calls))
            # What cannot be copied is shown as text.
            assert "lock object" in reply.messages[0]["content"]
            assert reply.messages[1]["content"] == [(0, 0), (1, 1)]


def test_a_process_that_cannot_start_says_so(tmp_path, monkeypatch):
    (tmp_path / "vanishing.py").write_text(
        'def tool(a: int) -> int:\n    """Do.\n\n    Args:\n        a: It.\n    """\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    import vanishing

    (tmp_path / "vanishing.py").unlink()
    with pytest.raises(ValueError, match="could not start.*No module named 'vanish"):
        host_of(vanishing.tool)


def test_a_process_that_dies_by_itself_again_and_again_is_given_up(monkeypatch):
    monkeypatch.setattr(_isolated, "_MOST_DEATHS", 2)
    with host_of(factory=examples.Doomed) as host:
        with host.play([{}], seeds=[0], members=1) as play:
            assert turn(play, 0, says("", call("wait"))) == Reply(done=True)
            (result,) = play.results()
    assert result.failure.kind == "crash" and math.isnan(result.rewards["Doomed"])


def test_ctrl_c_in_a_worker_is_passed_on():
    with host_of(examples.stop) as host:
        with host.play([{"prompt": "p"}], seeds=[0], members=1) as play:
            play.send(0, says("", call("stop")))
            with pytest.raises(KeyboardInterrupt):
                play.wait([0])
