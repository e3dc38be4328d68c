"""Two processes train as one does; they stop, resume and fail together."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from grpo_jax import load_pretrained, restore, train
from grpo_jax.checkpointing.checksum import params_sha256
from grpo_jax.reporting import _run_files
from grpo_jax.reporting import metrics as names

pytestmark = pytest.mark.slow

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import two_processes  # noqa: E402


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(arguments, *, process, port, stderr):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "GRPO_COORDINATOR": f"localhost:{port}",
        "GRPO_NUM_PROCESSES": "2",
        "GRPO_PROCESS_ID": str(process),
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def finish(processes, *, timeout=600):
    """Exit statuses and outputs; no process or pipe outlives the test."""
    with contextlib.ExitStack() as stack:
        for one in processes:
            stack.enter_context(one)
            stack.callback(one.kill)
        outputs = [one.communicate(timeout=timeout)[0] for one in processes]
    return [one.returncode for one in processes], outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def reports(tiny_policy, folder):
    """What each of two processes saw of the runs in `two_processes`."""
    script = [HERE / "two_processes.py", tiny_policy.folder, folder]
    port = free_port()
    with open(folder / "stderr.txt", "w") as stderr:
        processes = [
            start(script, process=process, port=port, stderr=stderr)
            for process in range(2)
        ]
        statuses, outputs = finish(processes)
    assert statuses == [0, 0], (folder / "stderr.txt").read_text()[-5000:]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.fixture(scope="module")
def alone(tiny_policy, tmp_path_factory):
    """The same run in this process, on as many devices."""
    devices = jax.devices()[:4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: devices)
        yield run_alone(tiny_policy, tmp_path_factory.mktemp("alone") / "run")


def run_alone(tiny_policy, run_dir):
    config = two_processes.make_config(str(tiny_policy.folder), str(run_dir))
    rows = two_processes.ROWS
    return train(
        config, dataset=rows, eval_dataset=rows[:3], rewards=two_processes.letters
    )


def test_two_processes_give_the_run_of_one(reports, alone, folder):
    given = names.read_metrics(folder / "whole")
    own = ("time/", "compile/", "tokens_per_second/", "mfu/")
    assert [line["step"] for line in given] == [0, 1, 2, 3]
    for line, expected in zip(given, alone.history, strict=True):
        compared = {name for name in expected if not name.startswith(own)}
        assert compared == {name for name in line if not name.startswith(own)}
        for name in compared:
            np.testing.assert_allclose(
                line[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name
            )
    for step in (1, 2, 3):
        there = _run_files.read_completions(folder / "whole", step)
        here = _run_files.read_completions(alone.run_dir, step)
        for row, expected in zip(there, here, strict=True):
            for name in ("prompt", "completion", "reward", "rewards", "length"):
                assert row[name] == expected[name]


def test_only_the_first_process_has_the_history(reports):
    first, second = (report["whole"] for report in reports)
    assert first == {**second, "lines": 4}
    assert second["lines"] == 0


def test_summary_export_and_checkpoint_hold_the_same_parameters(reports, folder):
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    assert summary["params_sha256"] == reports[0]["whole"]["sha256"]
    restored = restore(folder / "whole")  # in one process, on one device
    assert restored.step == 3
    assert params_sha256(restored.params) == summary["params_sha256"]
    exported = load_pretrained(folder / "whole" / "export")
    assert params_sha256(exported.params) == summary["params_sha256"]


def test_two_processes_merge_adapters_for_the_checksum_and_the_export(reports, folder):
    one, other = (report["adapted"]["sha256"] for report in reports)
    exported = load_pretrained(folder / "adapted" / "export")
    assert params_sha256(exported.params) == one == other


def test_groups_that_continue_do_so_on_both_processes(reports):
    for report in reports:
        assert report["carried_stopped"]["steps"] == 1
        resumed, whole = report["carried_resumed"], report["carried"]
        assert resumed["sha256"] == whole["sha256"] != report["whole"]["sha256"]


def test_a_signal_to_one_stops_both_after_the_same_step(reports, folder):
    for report in reports:
        assert report["stopped"]["status"] == "preempted"
        # Told in step 2: that step is abandoned.
        assert report["stopped"]["steps"] == 1
    assert reports[0]["stopped"]["sha256"] == reports[1]["stopped"]["sha256"]
    # Step 1 was saved for the signal alone.
    assert (folder / "stopped" / "checkpoints" / "1").is_dir()


def test_the_resumed_run_ends_in_the_bits_of_the_undisturbed_one(reports, folder):
    for report in reports:
        assert report["resumed"]["status"] == "finished"
        assert report["resumed"]["sha256"] == report["whole"]["sha256"]
    lines = names.read_metrics(folder / "stopped")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    manifest = json.loads((folder / "stopped" / "manifest.json").read_text())
    assert manifest["status"] == "finished"


def test_one_process_goes_on_where_two_stopped(reports, folder, alone, tiny_policy):
    (folder / "stopped" / "checkpoints" / "3").rename(folder / "3")
    # From step 2, on other devices than before.
    resumed = run_alone(tiny_policy, folder / "stopped")
    assert [line["step"] for line in resumed.history] == [0, 1, 2, 3]
    np.testing.assert_allclose(
        resumed.history[-1]["loss"], alone.history[-1]["loss"], rtol=1e-4
    )


def test_a_failing_reward_on_one_process_ends_both(reports, folder):
    first, second = (report["failed"] for report in reports)
    assert "process 1 of 2 failed in 'rewards'" in first
    assert "no disk left" in second
    manifest = json.loads((folder / "failed" / "manifest.json").read_text())
    assert manifest["status"] == "failed"


def test_what_one_process_refuses_ends_both(reports):
    assert (
        "another configuration (stored and new value)\n  seed: " in reports[0]["other"]
    )
    assert "process 0 of 2 failed in 'start'" in reports[1]["other"]


def test_meshes_and_batches_that_do_not_fit_the_processes_are_refused(reports):
    for report in reports:
        assert "use 8" in report["uneven"]
        assert "mesh.tensor 4 reaches over processes" in report["wide"]
        assert "use 2" in report["wide"]
