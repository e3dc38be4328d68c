"""Runs in a bucket, by gcsfs and TensorStore, on a stand-in for Cloud Storage."""

import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import TrainConfig, cli, restore, train
from grpo_jax.checkpointing import _bucket_lock, bucket
from grpo_jax.checkpointing._bucket_lock import BucketLock, LostLockError
from grpo_jax.checkpointing._gcs import Objects
from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.config import CheckpointConfig, ReportConfig, SamplingConfig
from grpo_jax.reporting.metrics import read_metrics
from grpo_jax.reporting.page import write_report

sys.path.insert(0, str(Path(__file__).parent))

from gcs_server import serving  # noqa: E402

# The stand-in has no gRPC, by which gcsfs asks what kind of bucket it is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
gcsfs = pytest.importorskip("gcsfs")
fsspec = pytest.importorskip("fsspec")
# Reads that Orbax has under way when another one fails end in a closed event loop.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def server():
    # gcsfs and TensorStore keep the address for the life of the process.
    with serving("bkt") as (url, store), pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        yield store
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture
def store(server):
    server.objects.clear()
    server.refuses = ""
    return server


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def items(value):
    return {"params": {"w": jnp.full((300, 70), value)}}


def names(store, folder):
    return {name.removeprefix(folder) for name in store.objects if folder in name}


def test_checkpoints_in_a_bucket_are_kept_damaged_and_restored_as_on_a_disk(store):
    reports = []
    config = CheckpointConfig(keep=2, keep_best="score", best_mode="max")
    kept = Checkpoints("gs://bkt/a/checkpoints", config, report=reports.append)
    for step, score in ((1, 0.0), (2, 9.0), (3, 1.0), (4, 2.0)):
        kept.save(step, items(step), {"step": step}, metrics={"score": score})
    assert kept.steps() == [2, 3, 4]
    assert not any("/1/" in name for name in store.objects)
    assert kept.restore(items(0), step="best")[2] == {"step": 2}

    # A save that was killed has no mark; the next save removes what it left.
    store.put("a/checkpoints/7/params/d/half", b"half")
    assert kept.steps() == [2, 3, 4]
    largest = max(
        names(store, "a/checkpoints/4/"),
        key=lambda name: len(store.objects[f"a/checkpoints/4/{name}"]),
    )
    content = bytearray(store.objects[f"a/checkpoints/4/{largest}"])
    content[len(content) // 2] ^= 1
    store.put(f"a/checkpoints/4/{largest}", bytes(content))
    found = Checkpoints("gs://bkt/a/checkpoints", config, read_only=True)
    assert found.restore(items(0))[0] == 3 and kept.steps()[-1] == 4
    step, params, meta = kept.restore(items(0))
    assert (step, meta) == (3, {"step": 3})
    np.testing.assert_array_equal(params["params"]["w"], items(3.0)["params"]["w"])
    assert "renamed to 4.damaged" in reports[0] and kept.steps() == [2, 3]
    assert largest in names(store, "a/checkpoints/4.damaged/")
    kept.save(4, items(44), {"step": 44}, wait=True)
    kept.save(4, items(45), {"step": 45}, wait=True)  # replaces it
    assert kept.restore_params()[::2] == (4, {"step": 45})
    assert not names(store, "a/checkpoints/7/")
    assert len(reports) == 2 and "4 has no 'score'" in reports[1]
    with pytest.raises(ValueError, match=r"no checkpoint 9 in gs://bkt/a/checkpoints"):
        kept.restore(items(0), step=9)


def test_a_lock_is_held_renewed_waited_for_and_taken_over(store):
    objects = Objects("gs://bkt/locked")
    first = BucketLock(objects)
    with pytest.raises(ValueError, match=r"in use by another run \(process \d+ on"):
        BucketLock(objects, wait=lambda _: first.renew())
    first.renew()
    # Its holder ends while the second waits.
    second = BucketLock(objects, wait=lambda _: first.release())
    # Its holder is gone.
    store.changed["locked/run.lock"] -= _bucket_lock._STALE + 1
    third = BucketLock(objects, wait=pytest.fail)
    with pytest.raises(LostLockError, match="another machine has taken over"):
        second.renew()
    second.release()
    third.renew()
    third.release()
    assert not store.objects


def test_of_two_that_find_a_stale_lock_one_gets_it(store, monkeypatch):
    objects = Objects("gs://bkt/locked")
    BucketLock(objects)
    store.changed["locked/run.lock"] -= _bucket_lock._STALE + 1
    look = Objects.state

    def look_then_lose(self, name):
        found = look(self, name)
        monkeypatch.setattr(Objects, "state", look)
        BucketLock(objects)
        return found

    monkeypatch.setattr(Objects, "state", look_then_lose)
    with pytest.raises(ValueError, match="in use by another run"):
        BucketLock(objects)


def test_a_mirror_sends_what_changes_and_nothing_else(store, temporary):
    folder = temporary / "run"
    (folder / "completions").mkdir(parents=True)
    store.put("m/config.yaml", b"old")
    store.put("m/completions/step_000001.jsonl", b"one")
    store.put("m/export/model.safetensors", b"large")
    store.put("m/checkpoints/5/commit_success.txt", b"")
    store.put("m/checkpoints/6/params/d/half", b"")
    with bucket.mirrored("gs://bkt/m", folder) as send:
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
        copied = {"config.yaml", "completions/step_000001.jsonl"}
        assert there == copied | {"completions", "checkpoints", "checkpoints/5"}
        store.requests.clear()
        send()
        assert [text.split()[0] for text in store.requests] == ["PATCH"]
        (folder / "metrics.jsonl").write_text("1\n")
        (folder / "half.tmp").write_text("not yet")
        (folder / "completions" / "step_000001.jsonl").unlink()
        send()
        assert store.objects["m/metrics.jsonl"] == b"1\n"
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("2\n")
    assert store.objects["m/metrics.jsonl"] == b"1\n2\n"
    assert names(store, "m/") == {
        "config.yaml",
        "metrics.jsonl",
        "export/model.safetensors",
        "checkpoints/5/commit_success.txt",
        "checkpoints/6/params/d/half",
    }
    assert not folder.exists()


def test_a_mirror_sends_by_itself_and_keeps_what_it_cannot_send(
    store, temporary, monkeypatch
):
    monkeypatch.setattr(bucket, "_INTERVAL", 0.01)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    folder = temporary / "run"
    folder.mkdir()
    with pytest.raises(OSError, match="Forbidden") as error:  # noqa: SIM117
        with bucket.mirrored("gs://bkt/m", folder):
            (folder / "log.txt").write_text("line")
            for _ in range(6000):
                if "m/log.txt" in store.objects:
                    break
                bucket.threading.Event().wait(0.01)
            assert store.objects["m/log.txt"] == b"line"
            store.refuses = "summary"
            (folder / "summary.json").write_text("{}")
    assert str(folder) in error.value.__notes__[-1]
    assert (folder / "summary.json").exists() and "m/run.lock" not in store.objects


def test_a_run_that_lost_its_lock_writes_nothing_more(store, temporary):
    folder = temporary / "run"
    folder.mkdir()
    with pytest.raises(LostLockError):  # noqa: SIM117
        with bucket.mirrored("gs://bkt/m", folder):
            (folder / "log.txt").write_text("mine")
            store.put("m/run.lock", b"another's")
    assert names(store, "m/") == {"run.lock"}


def test_an_address_never_leads_out_of_its_folder(store, temporary):
    for wrong in ("gs://bkt/runs/..", "gs:/bkt/../x", "gs://bkt/./x", "gs://bkt//x"):
        with pytest.raises(ValueError, match="run_dir"):
            TrainConfig(run_dir=wrong)
        with pytest.raises(ValueError, match="no part of an address"):
            bucket.local_copy(wrong)
    assert not [*temporary.iterdir()]


def test_a_lock_is_renewed_while_one_file_takes_long(store, temporary, monkeypatch):
    monkeypatch.setattr(_bucket_lock, "_RENEWAL", 0.0)
    renewed = []
    touch = Objects.touch

    def noted(self, *args):
        renewed.append(args)
        touch(self, *args)

    monkeypatch.setattr(Objects, "touch", noted)
    upload = Objects.upload

    def slow(self, *args):
        seen, end = len(renewed), time.monotonic() + 600
        while len(renewed) < seen + 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert len(renewed) >= seen + 2
        upload(self, *args)

    monkeypatch.setattr(Objects, "upload", slow)
    folder = temporary / "run"
    folder.mkdir()
    with bucket.mirrored("gs://bkt/r", folder):
        (folder / "model.safetensors").write_text("large")
    assert names(store, "r/") == {"model.safetensors"}


def config_of(policy, tmp_path, run_dir, **changes):
    rows = tmp_path / "sums.jsonl"
    lines = [json.dumps({"prompt": f"{n}+1=", "answer": n + 1}) for n in range(20)]
    rows.write_text("\n".join(lines))
    return TrainConfig(
        model=str(policy.folder),
        task=str(rows),
        run_dir=run_dir,
        steps=3,
        prompts_per_step=8,
        group_size=2,
        max_prompt_tokens=16,
        max_new_tokens=6,
        eval_every=0,
        eval_prompts=0,
        sampling=SamplingConfig(stop_ids=tuple(range(0, 264, 5))),
        checkpoint=CheckpointConfig(every=2),
        report=ReportConfig(completions_every=1),
        **changes,
    )


def letters(act=None, at=None):
    def letters(completions, trainer_state, **_):
        if trainer_state.global_step == at:
            act()
        return [float(sum(map(ord, text)) % 7) for text in completions]

    return letters


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise RuntimeError("crash")


def metrics_of(history):
    free = ("time/", "tokens_per_second/", "mfu/", "compile/")
    return [
        {name: value for name, value in line.items() if not name.startswith(free)}
        for line in history
    ]


def test_a_run_in_a_bucket_is_stopped_and_resumed_on_a_new_machine_in_the_same_bits(
    store, tiny_policy, tmp_path, temporary, monkeypatch, capsys
):
    monkeypatch.setattr("grpo_jax.training.loop.plot_runs", lambda runs, out: None)
    monkeypatch.chdir(tmp_path)
    place = "gs://bkt/runs/sums"
    rows = [{"prompt": f"{n}+1="} for n in range(20)]
    apart = train(
        config_of(tiny_policy, tmp_path, str(tmp_path / "run")),
        dataset=rows,
        rewards=letters(),
    )
    config = config_of(tiny_policy, tmp_path, place)
    halted = train(config, dataset=rows, rewards=letters(stop, at=2))
    assert halted.summary["status"] == "preempted" and halted.run_dir == place
    manifest = json.loads(store.objects["runs/sums/manifest.json"])
    assert (manifest["status"], manifest["step"]) == ("preempted", 1)
    assert "runs/sums/checkpoints/1/commit_success.txt" in store.objects
    assert not any(temporary.iterdir()) and "runs/sums/run.lock" not in store.objects

    # A crash after step 2, whose checkpoint is there: nothing was sent after it.
    with pytest.raises(RuntimeError, match="reward function 'letters' failed"):
        train(config, dataset=rows, rewards=letters(crash, at=3))
    lines = store.objects["runs/sums/metrics.jsonl"].splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(ValueError, match="gs://bkt/runs/sums holds a run with another"):
        train(other, dataset=rows, rewards=letters())

    resumed = train(config, dataset=rows, rewards=letters())
    assert resumed.summary["params_sha256"] == apart.summary["params_sha256"]
    assert metrics_of(resumed.history) == metrics_of(apart.history)
    for step in (1, 2, 3):
        file = f"completions/step_00000{step}.jsonl"
        mine = (tmp_path / "run" / file).read_bytes()
        assert store.objects[f"runs/sums/{file}"] == mine
    assert names(store, "runs/sums/") >= {"summary.json", "export/model.safetensors"}
    assert "resumed from step 2 of 3" in store.objects["runs/sums/log.txt"].decode()

    # Read on another machine.
    restored = restore(Path(place))
    assert restored.step == 3
    np.testing.assert_array_equal(
        restored.params["embed"]["embedding"], apart.params["embed"]["embedding"]
    )
    assert metrics_of(read_metrics(place)) == metrics_of(apart.history)
    page = write_report(place)
    assert page == Path("report.html") and "sums" in page.read_text()
    capsys.readouterr()
    task = str(tmp_path / "sums.jsonl")
    cli._dispatch(["eval", "--run-dir", place, "--task", task, "--prompts", "2"])
    assert json.loads(capsys.readouterr().out)["model"] == place
    cli._dispatch(["export", "--run-dir", place])
    exported = (tmp_path / "export" / "model.safetensors").read_bytes()
    assert exported == store.objects["runs/sums/export/model.safetensors"]
    assert not any(store.sessions)


def test_a_save_without_its_metrics_fails_and_the_run_goes_on(
    store, tiny_policy, tmp_path, temporary, monkeypatch
):
    monkeypatch.setattr("grpo_jax.training.loop.plot_runs", lambda runs, out: None)

    def away():
        store.refuses = "metrics"

    def back():
        assert "f/checkpoints/2/commit_success.txt" not in store.objects
        store.refuses = ""

    def letters_(completions, trainer_state, **_):
        {2: away, 3: back}.get(trainer_state.global_step, lambda: None)()
        return [float(len(text)) for text in completions]

    config = config_of(tiny_policy, tmp_path, "gs://bkt/f")
    rows = [{"prompt": f"{n}+1="} for n in range(20)]
    result = train(config, dataset=rows, rewards=letters_)
    assert result.summary["status"] == "finished"
    log = store.objects["f/log.txt"].decode()
    assert "checkpoint 2 could not be saved: Forbidden" in log
    assert "f/checkpoints/3/commit_success.txt" in store.objects
    assert len(store.objects["f/metrics.jsonl"].splitlines()) == 3


@pytest.mark.parametrize(
    ("place", "refused", "message"),
    [
        ("gs://other-bucket/run", "", "there is no bucket 'other-bucket'"),
        ("gs://bkt/run", "run", "gs://bkt/run cannot be used: Forbidden.*objectAdmin"),
        (
            "s3://bkt/run",
            "",
            "a local folder or gs://BUCKET/FOLDER.*got 's3://bkt/run'",
        ),
        ("gs://bkt", "", "a local folder or gs://BUCKET/FOLDER.*got 'gs://bkt'"),
        ("gs://bkt/a//b", "", "or gs://BUCKET/FOLDER"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_refused_before_anything_is_loaded(
    place, refused, message, store, tiny_policy, tmp_path, temporary, monkeypatch
):
    store.refuses = refused
    monkeypatch.setattr("grpo_jax.training._run.load_policy", pytest.fail)
    with pytest.raises(ValueError, match=message):
        train(config_of(tiny_policy, tmp_path, place))
    assert not any(temporary.iterdir())


def test_without_gcsfs_it_is_named(tiny_policy, tmp_path, temporary, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"pip install 'grpo-jax\[gcs\]'"):
        train(config_of(tiny_policy, tmp_path, "gs://bkt/run"))


def test_a_place_without_a_run_says_so(store, temporary):
    with pytest.raises(ValueError, match="gs://bkt/nothing holds no run"):
        restore("gs://bkt/nothing")


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("gs://bkt/runs/a", "gs://bkt/runs/a"),
        (Path("gs://bkt/runs/a"), "gs://bkt/runs/a"),
        ("gs://bkt/runs/a/", "gs://bkt/runs/a"),
        ("runs/a", None),
        (None, None),
    ],
)
def test_addresses_are_told_from_folders(given, address):
    assert bucket.bucket_address(given) == address
