"""The first signal is a request, the second the end; a stopped process resumes."""

import signal
import threading

import pytest

from grpo_jax.parallel.agreement import Agreement
from grpo_jax.training import _preemption
from grpo_jax.training._preemption import stop_requests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request_and_the_second_ends_the_process(
    number, monkeypatch
):
    codes, ended = [], threading.Event()

    def end(code):
        codes.append(code)
        ended.set()

    monkeypatch.setattr(_preemption.os, "_exit", end)
    agreement = Agreement()
    with stop_requests(agreement):
        assert not agreement.asked
        signal.raise_signal(number)
        assert agreement.asked and not agreement.stop and not codes
        with agreement.phase("any"):
            pass
        assert agreement.stop
        signal.raise_signal(number)
        assert ended.wait(timeout=600)
    assert codes == [128 + number]


def test_handlers_are_put_back():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyError), stop_requests(Agreement()):
        raise KeyError
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_of_the_main_thread_nothing_is_handled():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with stop_requests(Agreement()):
            seen.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


def test_a_phase_that_outlasts_the_grace_is_told_once_if_nothing_was_compiled():
    told = []
    check = _preemption.GraceCheck(30.0, report=told.append).check
    slow, quick = {"time/rollout": 31.0, "time/update": 5.0}, {"time/rollout": 2.0}
    check(1, slow | {"compile/count": 9})  # the first step
    check(1, quick | {"compile/count": 9})
    check(1, slow | {"compile/count": 11})  # prompts of another length
    assert not told
    check(1, slow | {"compile/count": 11})
    check(1, slow | {"compile/count": 11})
    assert len(told) == 1 and told[0].startswith("rollout took 31 s, longer than")
