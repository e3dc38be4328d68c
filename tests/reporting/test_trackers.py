import math
import os
import sys
import types

import pytest

from grpo_jax.config import ReportConfig
from grpo_jax.reporting import _run_files, metrics, trackers
from grpo_jax.reporting.text import readable_text


def _row(step, text="4"):
    return {
        "step": step,
        "prompt": "2+2?",
        "completion": text,
        "rewards": {"correct": 1.0, "style": None},
        "reward": 1.0,
        "advantage": 0.5,
        "length": 2,
        "finished": True,
    }


def test_metrics_lines_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    tracker = trackers._JsonlTracker(tmp_path)
    tracker.log({"eval/accuracy": 0.25}, 0)
    tracker.log({"loss": math.nan, "reward": 1.0}, 1)
    assert metrics.read_metrics(tmp_path) == [
        {"eval/accuracy": 0.25, "step": 0},
        {"loss": None, "reward": 1.0, "step": 1},
    ]
    tracker.close()


def test_hostile_completions_come_back_as_they_were(tmp_path, synthetic):
    tracker = trackers._JsonlTracker(tmp_path)
    rows = [_row(7, text) for text in synthetic.HOSTILE]
    tracker.log_completions(rows, 7)
    tracker.close()
    lines = (tmp_path / "completions/step_000007.jsonl").read_bytes().splitlines()
    assert len(lines) == len(synthetic.HOSTILE)
    assert _run_files.read_completions(tmp_path, 7) == rows


def test_resumed_run_has_each_step_once(tmp_path):
    def run(first, last, value):
        for step in range(first, last + 1):
            tracker.log({"reward": value}, step)
            tracker.log_completions([_row(step, str(value))], step)

    tracker = trackers._JsonlTracker(tmp_path)
    run(1, 5, 0.0)
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rewa')  # killed here; the checkpoint is of step 3

    tracker = trackers._JsonlTracker(tmp_path)
    tracker.truncate_after(3)
    assert _run_files.completion_steps(tmp_path) == [1, 2, 3]
    run(4, 6, 1.0)
    tracker.close()
    history = metrics.read_metrics(tmp_path)
    assert [line["step"] for line in history] == [1, 2, 3, 4, 5, 6]
    assert [line["reward"] for line in history] == [0, 0, 0, 1, 1, 1]
    assert _run_files.read_completions(tmp_path, 4)[0]["completion"] == "1.0"
    assert not list(tmp_path.rglob("*.partial"))


def test_truncation_before_the_first_evaluation_leaves_nothing(tmp_path):
    tracker = trackers._JsonlTracker(tmp_path)
    tracker.log({"eval/accuracy": 0.25}, 0)
    tracker.truncate_after(-1)
    tracker.close()
    assert metrics.read_metrics(tmp_path) == []


def test_truncation_that_is_interrupted_leaves_the_old_lines(tmp_path, monkeypatch):
    tracker = trackers._JsonlTracker(tmp_path)
    tracker.log({}, 1)
    tracker.log({}, 2)

    def fail(*paths):
        raise OSError("interrupted")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="interrupted"):
        tracker.truncate_after(1)
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1, 2]
    tracker.close()


def test_flush_syncs_the_file_of_metrics(tmp_path, monkeypatch):
    tracker = trackers._JsonlTracker(tmp_path)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    tracker.flush()
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_ino]
    tracker.close()


def test_process_without_trackers_writes_nothing(tmp_path):
    config = ReportConfig(tensorboard=True, wandb=True)
    tracker = trackers.make_tracker(config, tmp_path, enabled=False)
    tracker.log({"loss": 1.0}, 1)
    tracker.log_completions([_row(1)], 1)
    tracker.truncate_after(0)
    tracker.flush()
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def _scalars(folder):
    """Step and value of every scalar by name, over all event files in their order."""
    from tensorboardX.proto.event_pb2 import Event

    found, restarts, texts = {}, [], []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            # A record: length (8 bytes), its checksum (4), the event, its checksum (4).
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.HasField("session_log"):
                restarts.append(event.step)
            for value in event.summary.value:
                if value.HasField("tensor"):
                    texts.append(value.tensor.string_val[0].decode())
                else:
                    pair = (event.step, value.simple_value)
                    found.setdefault(value.tag, []).append(pair)
    return found, restarts, texts


def test_tensorboard_files_hold_the_numbers_and_the_restart(tmp_path):
    pytest.importorskip("tensorboardX")
    tracker = trackers.make_tracker(ReportConfig(tensorboard=True), tmp_path)
    tracker.log({"reward": 0.5, "loss": math.nan, "kl": 0.25}, 1)
    tracker.log({"reward": 0.75}, 2)
    tracker.log_completions([_row(2, "\x1b[1m# not a *title*\nlast")], 2)
    tracker.truncate_after(1)
    tracker.log({"reward": 1.0}, 2)
    tracker.close()
    scalars, restarts, texts = _scalars(tmp_path / "tensorboard")
    assert scalars == {"reward": [(1, 0.5), (2, 0.75), (2, 1.0)], "kl": [(1, 0.25)]}
    assert restarts == [2]  # TensorBoard hides what older files say from step 2 on
    assert all(line.startswith("    ") for line in texts[0].split("\n"))
    assert "\\x1b[1m# not a *title*" in texts[0]


def test_tensorboard_leaves_no_file_without_numbers(tmp_path):
    files = []
    for _ in range(2):  # a run that is started, and started again
        tracker = trackers.make_tracker(ReportConfig(tensorboard=True), tmp_path)
        tracker.truncate_after(-1)
        files.append(list(tmp_path.rglob("*tfevents*")))
        tracker.log({"reward": 0.5}, 1)
        tracker.flush()
        tracker.close()
    assert [len(found) for found in files] == [0, 1]
    assert len(list(tmp_path.rglob("*tfevents*"))) == 2
    idle = trackers.make_tracker(ReportConfig(tensorboard=True), tmp_path)
    idle.truncate_after(1)
    idle.flush()
    idle.close()
    assert len(list(tmp_path.rglob("*tfevents*"))) == 2


class _FakeRun:
    def __init__(self):
        self.logged = []
        self.finished = False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def _fake_wandb(monkeypatch):
    calls, run = [], _FakeRun()

    def init(**options):
        calls.append(options)
        return run

    def table(**content):
        return content

    module = types.SimpleNamespace(init=init, Table=table)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls, run


def test_wandb_gets_numbers_a_table_and_the_same_id_after_a_restart(
    tmp_path, monkeypatch
):
    calls, run = _fake_wandb(monkeypatch)
    for _ in range(2):
        tracker = trackers.make_tracker(ReportConfig(wandb=True), tmp_path / "mine")
        tracker.log({"reward": 0.5, "kl": math.inf}, 1)
        tracker.log_completions([_row(1)], 1)
        tracker.close()
    assert calls[0]["name"] == "mine" and calls[0]["resume"] == "allow"
    assert calls[0]["id"] == calls[1]["id"]
    assert run.logged[0] == (1, {"reward": 0.5})
    table = run.logged[1][1]["completions"]
    told = dict(_row(1))
    told |= {f"rewards/{name}": value for name, value in told.pop("rewards").items()}
    assert dict(zip(table["columns"], table["data"][0], strict=True)) == told
    assert run.finished


def test_a_conversation_is_text_in_tensorboard_and_in_the_table_of_wandb(
    tmp_path, monkeypatch, synthetic
):
    pytest.importorskip("tensorboardX")
    _, run = _fake_wandb(monkeypatch)
    config = ReportConfig(wandb=True, tensorboard=True)
    tracker = trackers.make_tracker(config, tmp_path)
    rows = [synthetic.talk(text="\x1b[2J9591"), _row(1, "plain")]
    rows[1]["rewards"] = {"correct": 0.0, "Game": None}
    tracker.log_completions(rows, 1)
    tracker.log_completions([_row(2, "\x1b[2J")], 2)
    tracker.close()
    first, plain, later = (
        dict(zip(table["columns"], line, strict=True))
        for _, logged in run.logged
        for table in logged.values()
        for line in table["data"]
    )
    talk = readable_text(rows[0]["completion"])
    assert first["completion"] == talk and "tool calculate: \\x1b[2J9591" in talk
    assert first["prompt"] == "user: What is 417 * 23?"
    assert later["completion"] == "\\x1b[2J"
    # Columns of episodes are there where a step had any.
    assert [first["turns"], first["calls"], plain["turns"]] == [2, 2, None]
    assert "turns" not in later
    (shown, *_) = _scalars(tmp_path / "tensorboard")[2]
    assert "\n".join(line[4:] for line in shown.split("\n")).endswith(f"---\n{talk}")
    # What is stored is the conversation itself.
    assert _run_files.read_completions(tmp_path, 1) == rows


def test_wandb_takes_its_names_from_the_environment(tmp_path, monkeypatch):
    calls, _ = _fake_wandb(monkeypatch)
    for _ in range(2):
        trackers.make_tracker(ReportConfig(wandb=True), tmp_path / "mine").close()
        monkeypatch.setenv("WANDB_PROJECT", "theirs")
        monkeypatch.setenv("WANDB_NAME", "first try")
    names = [(call["project"], call["name"]) for call in calls]
    assert names == [("grpo_jax", "mine"), ("theirs", "first try")]


@pytest.mark.parametrize(
    ("field", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_missing_package_is_told_with_its_extra_before_anything_is_written(
    tmp_path, monkeypatch, field, package
):
    # None in sys.modules makes an import fail as if the package were not there.
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"pip install 'grpo-jax\[{field}\]'"):
        trackers.make_tracker(ReportConfig(**{field: True}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_composite_closes_every_tracker_although_one_fails():
    closed = []

    class Failing(trackers._CompositeTracker):
        def close(self):
            raise OSError("disk full")

    class Good(trackers._CompositeTracker):
        def close(self):
            closed.append(True)

    both = trackers._CompositeTracker([Good(()), Failing(()), Good(())])
    with pytest.raises(OSError, match="disk full"):
        both.close()
    assert closed == [True, True]
