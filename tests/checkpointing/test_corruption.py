"""An error of the storage is no damage: it is waited for, and costs no checkpoint."""

import errno
import os
import pathlib
import shutil
import sys

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from grpo_jax.checkpointing import _corruption
from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.config import CheckpointConfig
from grpo_jax.training.state import TrainState, state_items

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from damages import data_file, flip  # noqa: E402

STATE = TrainState(
    step=jnp.zeros((), jnp.int32), params={"w": jnp.arange(512.0)}, opt_state=()
)


def as_python(number):
    return OSError(number, os.strerror(number))


def as_tensorstore(number):
    """What TensorStore raises when a read fails, as seen with a failing `pread`."""
    text = f"at offset 0: {os.strerror(number)} [os_error_code='{number}'] [spec='{{}}'"
    return ValueError(f"UNKNOWN: Error reading local file: {text}]")


def wrapped(error):
    """As Orbax hands it on."""
    outer = KeyError("no entry")
    outer.__cause__ = error
    return outer


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(_corruption, "PAUSES", (0.0, 0.0))


@pytest.fixture
def two_steps(tmp_path):
    config = CheckpointConfig(keep=2)
    checkpoints = Checkpoints(tmp_path / "run", config)
    for step in (1, 2):
        checkpoints.save(step, state_items(STATE), {})
    checkpoints.close()
    return tmp_path / "run"


def snapshot(folder):
    """All that is in a folder; times tell even of files that came and went."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        content = path.read_bytes() if path.is_file() else None
        found[path] = (path.stat().st_mtime_ns, content)
    return found


@pytest.mark.parametrize("told", [as_python, as_tensorstore])
@given(number=st.sampled_from(sorted(errno.errorcode)))
def test_only_files_that_are_not_there_are_damaged(told, number):
    error = wrapped(told(number))
    missing = number in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    assert (_corruption.corruption_of(error) is not None) == missing


def test_what_makes_no_sense_is_damage_whatever_it_quotes():
    assert (
        _corruption.corruption_of(ValueError("DATA_LOSS: digest mismatch")) is not None
    )
    assert _corruption.corruption_of(ValueError("UNAVAILABLE: try later")) is None


@pytest.mark.parametrize("failures", [0, 1, 2])
@pytest.mark.parametrize("told", [as_python, as_tensorstore])
def test_what_may_pass_is_tried_again(no_pauses, told, failures):
    left = [wrapped(told(errno.EIO))] * failures

    def read():
        if left:
            raise left.pop()
        return "read"

    assert _corruption.with_retries(read) == "read"


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (as_python(errno.EIO), 3),
        (as_tensorstore(errno.ESTALE), 3),
        (ValueError("UNAVAILABLE: away"), 3),
        (FileNotFoundError(errno.ENOENT, "gone"), 1),
        (as_python(errno.EACCES), 1),
        (as_python(errno.ENOSPC), 1),
        (ValueError("DATA_LOSS"), 1),
        (_corruption.CorruptCheckpointError("changed values"), 1),
    ],
)
def test_what_stays_is_raised_as_it_is(no_pauses, error, tries):
    calls = []

    def read():
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as raised:
        _corruption.with_retries(read)
    assert raised.value is error and len(calls) == tries
    told = "".join(getattr(error, "__notes__", []))
    assert ("nothing was changed" in told) == (tries > 1)


def failing(times, real, concerns):
    left = [times]

    def read(path, *arguments, **options):
        if concerns in str(path) and left[0]:
            left[0] -= 1
            raise as_python(errno.EIO)
        return real(path, *arguments, **options)

    return read


@pytest.mark.parametrize("owner", [ocp, pathlib.Path, os])
@pytest.mark.parametrize("times", [1, 1000])
def test_an_error_of_the_storage_costs_no_checkpoint(
    two_steps, no_pauses, monkeypatch, owner, times
):
    name = {ocp: "load_checkpointables", pathlib.Path: "stat", os: "scandir"}[owner]
    before = snapshot(two_steps)
    reports = []
    checkpoints = Checkpoints(two_steps, CheckpointConfig(), report=reports.append)
    with monkeypatch.context() as patch:
        concerns = "run" if owner is os else "run/2"
        patch.setattr(owner, name, failing(times, getattr(owner, name), concerns))
        if times == 1:
            assert checkpoints.restore(state_items(STATE))[0] == 2
        else:
            with pytest.raises(OSError, match="Input/output error"):
                checkpoints.restore(state_items(STATE))
    assert snapshot(two_steps) == before and reports == []
    assert checkpoints.restore(state_items(STATE))[0] == 2


def test_who_only_reads_leaves_a_damaged_step_where_it_is(two_steps):
    flip(data_file(two_steps / "2"))
    before = snapshot(two_steps)
    reports = []
    for _ in range(2):
        reader = Checkpoints(
            two_steps, CheckpointConfig(), report=reports.append, read_only=True
        )
        assert reader.restore_params()[0] == 1
        reader.close()
    assert snapshot(two_steps) == before
    assert all("2 is damaged" in r and "stays where it is" in r for r in reports)
    assert len(reports) == 2


def test_a_step_that_its_run_removes_while_it_is_read_is_not_damaged(
    two_steps, monkeypatch
):
    (two_steps / "2").rename(two_steps.parent / "next")
    load = ocp.load_checkpointables

    def go_on(*arguments):
        """The run saves a step and removes the old one."""
        monkeypatch.setattr(ocp, "load_checkpointables", load)
        (two_steps.parent / "next").rename(two_steps / "2")
        shutil.rmtree(two_steps / "1")
        return load(*arguments)

    monkeypatch.setattr(ocp, "load_checkpointables", go_on)
    reports = []
    reader = Checkpoints(
        two_steps, CheckpointConfig(), report=reports.append, read_only=True
    )
    assert reader.restore_params()[0] == 2
    assert reports == ["checkpoint 1 was removed while it was read"]
