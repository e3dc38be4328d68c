"""The device check on virtual CPU devices."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "tpu_setup/check_devices.py"


@pytest.fixture(scope="module")
def check_devices():
    spec = importlib.util.spec_from_file_location("check_devices", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_eight_devices_pass_and_leave_nothing_behind(check_devices, tmp_path, capsys):
    folder = tmp_path / "bucket"
    arguments = ["--platform", "cpu", "--devices", "8", "--processes", "1"]
    assert check_devices.main([*arguments, "--bucket", str(folder)]) == 0
    assert "8 x" in capsys.readouterr().out
    assert list(folder.iterdir()) == []


def test_the_reduction_runs_over_every_device(check_devices):
    assert check_devices.all_reduce_total() == 36  # 1 + 2 + ... + 8


def test_an_absent_platform_fails_and_says_what_to_do(check_devices, capsys):
    assert check_devices.main(["--platform", "tpu"]) == 1
    error = capsys.readouterr().err
    assert "expected platform tpu, found cpu" in error
    assert "libtpu_lockfile" in error and "README.md" in error


def test_wrong_counts_are_each_reported(check_devices, capsys):
    arguments = ["--platform", "cpu", "--devices", "4", "--processes", "2"]
    assert check_devices.main(arguments) == 1
    error = capsys.readouterr().err
    assert "expected 4 devices, found 8" in error
    assert "expected 2 processes, found 1" in error


def test_a_wrong_sum_is_reported(check_devices, capsys, monkeypatch):
    monkeypatch.setattr(check_devices, "all_reduce_total", lambda: 35)
    assert check_devices.main(["--platform", "cpu"]) == 1
    assert "gave 35 instead of 36" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_reported(check_devices, tmp_path, capsys):
    (tmp_path / "file").touch()
    target = str(tmp_path / "file" / "below")
    assert check_devices.main(["--platform", "cpu", "--bucket", target]) == 1
    assert "cannot write" in capsys.readouterr().err
