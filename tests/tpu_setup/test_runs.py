"""Sync, install, run, status and babysit, with local folders as workers."""

import os
import shlex
import shutil
import sys
import time
from signal import SIGTERM

import pytest

BABYSIT = ("--type", "v5litepod-8", "--poll", "0", "--backoff", "0")
# The words a shell would take apart, expand or execute.
AWKWARD = [
    "two words",
    "it's",
    '"$HOME"',
    "$(touch canary)",
    "a;b|c&d",
    "*",
    "",
    "x\ny",
]
RECORD = "import json, sys; print('WORDS', json.dumps(sys.argv[1:]))"


@pytest.fixture
def installed(committed):
    """A ready TPU of two workers with everything installed."""
    committed.set_states(queue="ACTIVE", node="READY")
    done = committed.run("install")
    assert done.returncode == 0, done.stderr
    return committed


def states(cloud) -> list[str]:
    lines = cloud.run("status").stdout.splitlines()
    lines = [line for line in lines if line.startswith("grpo-jax-state")]
    return [dict(w.split("=", 1) for w in line.split()[1:4])["state"] for line in lines]


def wait_for(cloud, state: str) -> None:
    deadline = time.monotonic() + 600
    while states(cloud) != [state, state]:
        assert time.monotonic() < deadline, (states(cloud), state)


def log(cloud, worker: int = 0) -> str:
    return (cloud.worker(worker) / "logs/latest.log").read_text()


def test_sync_sends_tracked_files_with_their_edits(committed):
    committed.set_states(queue="ACTIVE", node="READY")
    assert committed.run("sync").returncode == 0
    for worker in range(2):
        code = committed.worker(worker) / "code"
        assert (code / "REVISION").read_text().strip() == committed.revision
    (committed.repository / "settings.txt").write_text("edited\n")
    (committed.repository / "private.txt").write_text("not tracked\n")
    assert committed.run("sync").returncode == 0
    code = committed.worker(1) / "code"
    assert (code / "settings.txt").read_text() == "edited\n"
    assert not (code / "private.txt").exists()
    assert (code / "REVISION").read_text().startswith(f"{committed.revision}-dirty-")
    assert (committed.repository / "settings.txt").read_text() == "edited\n"


def test_code_without_a_commit_is_refused(cloud, tmp_path):
    done = cloud.run("sync", GIT_CEILING_DIRECTORIES=str(tmp_path))
    assert done.returncode == 1 and "no git commit" in done.stderr
    assert cloud.calls() == []


def test_install_makes_an_environment_and_checks_it_on_every_worker(committed):
    committed.set_states(queue="ACTIVE", node="READY")
    for _ in range(2):  # the second time finds the environment
        done = committed.run(
            "install", "--type", "v5litepod-8", BUCKET="gs://my-bucket"
        )
        assert done.returncode == 0, done.stderr
    for worker in range(2):
        home = committed.worker(worker)
        venv, code = home / "venv", home / "code"
        calls = (home.parent / "uv.log").read_text().splitlines()
        install = f"uv pip install --quiet --python {venv}/bin/python --editable"
        check = (
            f"python {code}/tpu_setup/check_devices.py --platform tpu --distributed"
            " --devices 8 --processes 1 --bucket gs://my-bucket"
        )
        again = [f"{install} {code}[tpu,hub]", check]
        assert calls == [f"uv venv --quiet --python 3.12 {venv}", *again, *again]


def test_a_command_reaches_every_worker_word_by_word(installed):
    done = installed.run("run", "--", sys.executable, "-c", RECORD, *AWKWARD)
    assert done.returncode == 0, done.stderr
    wait_for(installed, "finished")
    for worker in range(2):
        words = log(installed, worker).split("WORDS ", 1)[1].splitlines()[0]
        assert words == (
            r'["two words", "it'
            + r"""'s", "\"$HOME\"", "$(touch canary)", "a;b|c&d", """
            r'"*", "", "x\ny"]'
        )
        assert f"revision: {installed.revision}" in log(installed, worker)


def test_the_default_command_is_a_training_run(installed):
    assert installed.run("run").returncode == 0
    wait_for(installed, "finished")
    assert "trains with train, tpu,cpu" in log(installed)


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (("bash", "no_such_file.sh"), 127, "No such file"),
        (("no-such-program",), 127, "not found"),
        (("bash", "-c", "echo wrong flag; exit 2"), 2, "wrong flag"),
        (("true",), 0, ""),
    ],
)
def test_a_command_that_ends_at_once_gives_its_exit_code(
    installed, command, code, words
):
    done = installed.run("run", "--", *command, GRPO_JAX_WATCH="600")
    assert done.returncode == code and words in done.stderr
    assert states(installed) == ["failed" if code else "finished"] * 2


def test_a_command_runs_where_the_code_is_and_what_it_writes_stays(installed):
    (installed.repository / "dropped.txt").write_text("of the first code\n")
    installed.git("add", "dropped.txt")
    script = "cat settings.txt dropped.txt; mkdir -p runs; date >runs/mine"
    done = installed.run("run", "--", "bash", "-c", script, GRPO_JAX_WATCH="600")
    assert done.returncode == 0, done.stderr
    assert "first\nof the first code" in log(installed)
    (installed.repository / "settings.txt").write_text("second\n")
    installed.git("rm", "--force", "--quiet", "dropped.txt")
    assert installed.run("sync").returncode == 0
    for worker in range(2):
        code = installed.worker(worker) / "code"
        assert (code / "runs/mine").read_text()
        assert (code / "settings.txt").read_text() == "second\n"
        assert not (code / "dropped.txt").exists()


@pytest.mark.parametrize("script", ["run", "babysit"])
def test_a_file_that_would_not_be_sent_is_refused(installed, script):
    (installed.repository / "mine.sh").write_text("echo mine\n")
    calls = len(installed.calls())
    flags = BABYSIT if script == "babysit" else ()
    done = installed.run(script, *flags, "--", "bash", "mine.sh")
    assert done.returncode == 2 and "git add mine.sh" in done.stderr
    assert len(installed.calls()) == calls


def test_a_live_run_is_left_alone_until_it_is_stopped(installed):
    saving = "trap 'sleep 0.3; echo saved; exit 0' TERM; while :; do sleep 0.1; done"
    command = ("--", "bash", "-c", saving)
    assert installed.run("run", *command).returncode == 0
    assert states(installed) == ["running", "running"]
    pids = [(installed.worker(w) / "run/pid").read_text() for w in range(2)]
    again = installed.run("run", *command)
    assert again.returncode == 0 and again.stdout.count("already running") == 2
    assert installed.run("run", "--", "true").returncode == 3
    assert installed.run("sync").returncode == 1
    assert installed.run("install").returncode == 1
    assert pids == [(installed.worker(w) / "run/pid").read_text() for w in range(2)]
    assert installed.run("run", "--stop").returncode == 0
    assert states(installed) == ["stopped", "stopped"]
    assert "saved" in log(installed) and "exit code 0" in log(installed)
    assert "nothing is running" in installed.run("run", "--stop").stdout


def test_status_tells_how_a_run_ended_and_collects_its_logs(installed, tmp_path):
    assert states(installed) == ["idle", "idle"]
    installed.run("run", "--", "bash", "-c", "echo the end; exit 7")
    wait_for(installed, "failed")
    done = installed.run("status", "--lines", "2", "--collect", str(tmp_path / "logs"))
    assert "rc=7" in done.stdout and f"revision={installed.revision}" in done.stdout
    assert "the end" in done.stdout
    for worker in range(2):
        assert (tmp_path / f"logs/worker-{worker}.log").read_text() == log(
            installed, worker
        )


def test_a_killed_run_is_interrupted_and_can_be_started_again(installed):
    installed.run("run", "--", "sleep", "60")
    installed.kill_runs()
    wait_for(installed, "interrupted")
    assert installed.run("run", "--", "true").returncode == 0
    wait_for(installed, "finished")


def test_a_run_that_saved_on_a_signal_of_the_platform_is_not_finished(installed):
    saving = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.1; done"
    installed.run("run", "--", "bash", "-c", saving)
    for worker in range(2):
        # The log names the command too, before it has started.
        end = time.monotonic() + 600
        while "ready" not in log(installed, worker).splitlines():
            assert time.monotonic() < end
            time.sleep(0.05)
        os.killpg(int((installed.worker(worker) / "run/pid").read_text()), SIGTERM)
    wait_for(installed, "interrupted")
    assert "exit code 0" in log(installed)


def test_a_run_that_ends_while_its_state_is_read_is_finished(installed):
    end, race = installed.root / "end", installed.root / "race"
    # The lock is tried the moment after the run has ended.
    ended = f"touch {end}; while [ ! -e $HOME/grpo-jax/run/rc ]; do sleep 0.05; done"
    flock = shutil.which("flock")
    installed.stand_in(
        "flock", f'#!/bin/sh\n[ ! -e {race} ] || {{ {ended}; }}\nexec {flock} "$@"\n'
    )
    script = f"until [ -e {end} ]; do sleep 0.05; done"
    assert installed.run("run", "--", "bash", "-c", script).returncode == 0
    race.touch()
    assert states(installed) == ["finished", "finished"]


def test_a_run_needs_an_installation(committed):
    committed.set_states(queue="ACTIVE", node="READY")
    done = committed.run("run", "--", "true")
    assert done.returncode == 1 and "install.sh" in done.stderr


def test_babysit_recreates_after_a_preemption_and_reruns_the_same_code(committed):
    committed.after_create(1, node="READY READY PREEMPTED")
    # What the first run leaves in the "bucket" tells the second that it resumes.
    bucket, tree = committed.root / "bucket", committed.repository / "settings.txt"
    script = (
        f"if [ -e {bucket} ]; then echo resumed; exit 0; fi;"
        f"echo later edit >{tree}; touch {bucket}; sleep 60"
    )
    done = committed.run("babysit", *BABYSIT, "--", "bash", "-c", script)
    assert done.returncode == 0, done.stderr
    changes = [c[3] for c in committed.calls() if c[3] in ("create", "delete")]
    assert changes == ["create", "delete", "create"]
    starts = [c[-1] for c in committed.calls("ssh") if " start " in c[-1]]
    assert len(starts) == 2 and starts[0] == starts[1]
    assert shlex.join(["bash", "-c"]) in starts[0]
    assert "resumed" in log(committed)
    assert f"revision: {committed.revision}\n" in log(committed)


def test_babysit_starts_a_crashed_command_again_without_a_new_tpu(committed):
    marks = committed.root / "marks"
    # Two workers start it each time: four marks are two starts.
    script = f"echo x >>{marks}; [ $(wc -l <{marks}) -ge 3 ]"
    done = committed.run("babysit", *BABYSIT, "--", "bash", "-c", script)
    assert done.returncode == 0, done.stderr
    assert len(marks.read_text().split()) == 4
    assert len(committed.calls("create")) == 1


def test_babysit_gives_up_after_the_retries(committed):
    done = committed.run("babysit", *BABYSIT, "--max-retries", "1", "--", "false")
    assert done.returncode == 1 and "gave up after 1 retries" in done.stderr
    starts = [c for c in committed.calls("ssh") if " start " in c[-1]]
    assert len(starts) == 2


@pytest.mark.parametrize("watch", ["0", "600"])
def test_babysit_does_not_repeat_a_command_that_is_refused(committed, watch):
    command = ("bash", "-c", "echo 'no such flag' >&2; exit 2")
    done = committed.run("babysit", *BABYSIT, "--", *command, GRPO_JAX_WATCH=watch)
    assert done.returncode == 2
    assert len([c for c in committed.calls("ssh") if " start " in c[-1]]) == 1


@pytest.mark.parametrize("watch", ["0", "2"])
def test_babysit_stops_the_workers_beside_one_that_refuses(committed, watch):
    # Which worker is the first to say so does not matter, nor whether it does so while
    # its start is watched.
    command = ("bash", "-c", "case $HOME in *worker-0) exit 2 ;; esac; sleep 600")
    done = committed.run("babysit", *BABYSIT, "--", *command, GRPO_JAX_WATCH=watch)
    assert done.returncode == 2 and "was refused" in done.stderr
    assert sorted(states(committed)) == ["failed", "stopped"]


def test_babysit_repeats_a_command_that_is_refused_after_it_once_ran(committed):
    committed.after_create(1, node="READY READY PREEMPTED")
    marks = committed.root / "marks"
    script = f"echo x >>{marks}; n=$(wc -l <{marks}); [ $n -gt 2 ] || sleep 60;"
    script += "[ $n -gt 4 ] || exit 2"
    done = committed.run("babysit", *BABYSIT, "--", "bash", "-c", script)
    assert done.returncode == 0, done.stderr
    assert len(marks.read_text().split()) == 6


def test_a_healthy_stretch_starts_the_count_again(committed):
    marks = committed.root / "marks"
    script = f"echo x >>{marks}; [ $(wc -l <{marks}) -ge 5 ]"
    flags = (*BABYSIT, "--max-retries", "1", "--healthy-after", "0")
    done = committed.run("babysit", *flags, "--", "bash", "-c", script)
    assert done.returncode == 0, done.stderr


def test_babysit_ends_when_the_run_is_stopped_by_hand(committed):
    stop = f"{committed.root}/worker-"
    # The run marks itself as `run.sh --stop` does before it sends SIGTERM.
    script = f"touch {stop}0/grpo-jax/run/stopped {stop}1/grpo-jax/run/stopped; exit 0"
    done = committed.run("babysit", *BABYSIT, "--", "bash", "-c", script)
    assert done.returncode == 3 and "stopped by hand" in done.stderr


def test_babysit_does_not_disturb_a_foreign_run(installed):
    installed.run("run", "--", "sleep", "60")
    done = installed.run("babysit", *BABYSIT, "--", "true")
    assert done.returncode == 3
    assert states(installed) == ["running", "running"]
