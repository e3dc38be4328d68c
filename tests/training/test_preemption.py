"""The first signal is a request, the second the end; a stopped process resumes."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from grpo_jax.parallel.agreement import Agreement
from grpo_jax.training import preemption
from grpo_jax.training.preemption import stop_requests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request_and_the_second_ends_the_process(
    number, monkeypatch
):
    codes, ended = [], threading.Event()

    def end(code):
        codes.append(code)
        ended.set()

    monkeypatch.setattr(preemption.os, "_exit", end)
    agreement = Agreement()
    with stop_requests(agreement):
        assert not agreement.asked
        signal.raise_signal(number)
        assert agreement.asked and not agreement.stop and not codes
        with agreement.phase("any"):
            pass
        assert agreement.stop
        signal.raise_signal(number)
        assert ended.wait(timeout=30)
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


def command(folder, run_dir):
    return [
        *(sys.executable, "-m", "grpo_jax", "train"),
        *("--model", str(folder), "--run-dir", str(run_dir), "--task", "arithmetic"),
        *("--steps", "15", "--prompts-per-step", "2", "--group-size", "2"),
        *("--max-new-tokens", "4", "--eval-every", "0", "--eval-prompts", "0"),
        *("--checkpoint.every", "1000", "--optimizer.learning-rate", "1e-3"),
        # Moves the parameters even where no answer is right.
        *("--objective.entropy-coef", "0.1"),
    ]


@pytest.fixture
def start(tiny_policy):
    def start(run_dir):
        return subprocess.Popen(
            command(tiny_policy.folder, run_dir),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def read(path, name):
    return json.loads((path / name).read_text())


@pytest.mark.slow
def test_a_process_that_is_terminated_saves_and_resumes_to_the_same_bits(
    start, tmp_path
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = start(stopped)
    metrics = stopped / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, "no steps"
        time.sleep(0.005)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert read(stopped, "manifest.json")["status"] == "preempted"
    assert not (stopped / "summary.json").exists()
    for path in (whole, stopped):
        process = start(path)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    digests = [read(path, "summary.json")["params_sha256"] for path in (whole, stopped)]
    assert digests[0] == digests[1]
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 16))
