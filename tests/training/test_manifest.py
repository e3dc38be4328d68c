"""A manifest tells what a run began with, and refuses or tells what differs later."""

import dataclasses
import datetime
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.config import MeshConfig, TrainConfig
from grpo_jax.config.files import to_jsonable, to_yaml, write_text
from grpo_jax.parallel import mesh as meshes
from grpo_jax.training import _manifest as manifests
from grpo_jax.training import _run_dir as directories
from grpo_jax.training._manifest import Origin, Record, changes


@pytest.fixture
def begun(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    return tmp_path


def record(path, **origin):
    mesh = meshes.make_mesh(MeshConfig())
    return Record(path, 0, mesh, Origin(**origin))


def read(path):
    return json.loads((path / "manifest.json").read_text())


_VALUES = st.recursive(
    st.none() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
_DATA = st.dictionaries(
    st.text(min_size=1), _VALUES | st.dictionaries(st.text(min_size=1), _VALUES)
)


@given(data=_DATA, other=_DATA)
def test_what_went_through_a_file_differs_only_where_it_does(data, other):
    saved = json.loads(json.dumps(to_jsonable(data)))
    assert list(changes(saved, data)) == []
    told = list(changes(saved, other))
    same = all(to_jsonable(other[n]) == saved[n] for n in saved.keys() & other)
    assert (told == []) == (same or saved.keys() & other.keys() <= {"rewards"})


def test_each_entry_of_a_mapping_is_named_and_what_is_new_is_not_compared():
    then = {"weights": {"a": 1, "b": 2}, "rows": 3, "rewards": {"f": 1}}
    now = {"weights": {"a": 1, "b": 5, "c": 6}, "prompts": 7, "rewards": {"f": 2}}
    told = list(changes(then, now))
    assert told == ["weights.b: 2 and 5", "weights.c: None and 6"]


def test_other_weights_are_refused_shortly(begun):
    first = record(begun)
    first.check({"weights": {f"w{i}": "0" for i in range(20)}})
    first.write("running")
    words = (
        r"^use another run_dir.*\n  weights.w0: '0' and '1'(\n.*){7}\n  and 12 more\n"
    )
    with pytest.raises(ValueError, match=words) as raised:
        record(begun).check({"weights": {f"w{i}": "1" for i in range(20)}})
    assert len(str(raised.value)) < 800
    # A run that has not begun leaves nothing to compare with.
    (begun / "metrics.jsonl").write_text("")
    record(begun).check({"weights": {"w0": "1"}})


def test_parts_are_listed_where_versions_differ_and_told(begun, monkeypatch):
    def version(name):
        return versions[name]

    versions = dict.fromkeys(manifests._PACKAGES, "1.0")
    monkeypatch.setattr(manifests, "_version", version)
    monkeypatch.setattr(manifests, "_git_revision", lambda: "abc")
    first = record(begun)
    for status in ("running", "preempted"):
        first.write(status)
    assert first.changed_machine() == []
    versions["jax"] = "2.0"
    monkeypatch.setenv("XLA_FLAGS", "--new")
    second = record(begun)
    (told,) = second.changed_machine()
    assert "versions.jax: '1.0' and '2.0'" in told
    assert "environment.XLA_FLAGS" in told and "--new" in told
    second.write("running", step=5)
    second.write("finished", step=9)
    manifest = read(begun)
    assert [p["versions"]["jax"] for p in manifest["parts"]] == ["1.0", "2.0"]
    assert [p["step"] for p in manifest["parts"]] == [0, 5]
    assert manifest["versions"]["jax"] == "2.0" and manifest["status"] == "finished"
    assert second.changed_machine() == []


def test_code_that_is_edited_while_it_runs_is_not_what_ran(begun, monkeypatch):
    monkeypatch.setattr(manifests, "_git_revision", lambda: "abc")
    running = record(begun)
    running.write("running")
    monkeypatch.setattr(manifests, "_git_revision", lambda: "abc-dirty")
    running.write("finished", step=9)
    assert [p["git_revision"] for p in read(begun)["parts"]] == ["abc"]


def test_the_manifest_of_an_earlier_version_is_the_first_part(begun):
    record(begun).write("preempted")
    old = read(begun)
    del old["parts"], old["started"]
    old["versions"]["jax"] = "0.1"
    (begun / "manifest.json").write_text(json.dumps(old))
    again = record(begun)
    assert "versions.jax: '0.1' and" in again.changed_machine()[0]
    again.write("running", step=3)
    assert [p["versions"]["jax"] for p in read(begun)["parts"]][0] == "0.1"
    assert len(read(begun)["parts"]) == 2


def test_processes_after_the_first_write_and_compare_nothing(begun):
    mesh = meshes.make_mesh(MeshConfig())
    other = Record(begun, 0, mesh, Origin(), enabled=False)
    other.check({"rows": 1})
    other.write("running")
    assert other.changed_machine() == []
    assert not (begun / "manifest.json").exists()


@given(started=st.datetimes(timezones=st.timezones()), commit=st.none() | st.text())
def test_the_beginning_of_a_run_stays_what_it_was(started, commit):
    origin = Origin(started=started.replace(microsecond=0), commit=commit)
    again = Origin.read(json.loads(json.dumps(origin.plain())))
    assert again.commit == commit
    # Templates see the clock of the place: hours and days, not the moment alone.
    assert again.started.replace(tzinfo=None) == origin.started.replace(tzinfo=None)


def test_a_run_without_a_beginning_begins_now():
    now = datetime.datetime.now().astimezone()
    assert abs(Origin.read({}).started - now) < datetime.timedelta(days=1)


# --- A run that is opened from another folder


@pytest.fixture
def started_elsewhere(begun, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "model").mkdir(parents=True)
    (home / "rows.jsonl").write_text("")
    monkeypatch.chdir(home)
    config = TrainConfig(model="model", task="rows.jsonl")
    directories.check_config(begun, config)
    record(begun).write("finished")
    monkeypatch.chdir(begun)
    return begun, home, config


def test_relative_paths_lead_to_where_the_run_was_started(started_elsewhere):
    path, home, config = started_elsewhere
    found = directories.read_located_config(path)
    assert (found.model, found.task) == (str(home / "model"), str(home / "rows.jsonl"))
    assert directories.read_config(path) == config  # the file stays as it was


def test_a_run_whose_files_moved_along_is_opened_from_there(started_elsewhere):
    path, home, _ = started_elsewhere
    (home / "model").rename(path / "model")
    assert directories.read_located_config(path).model == "model"


def test_a_local_model_that_is_gone_is_not_looked_for_on_the_hub(started_elsewhere):
    path, home, _ = started_elsewhere
    (home / "model").rmdir()
    with pytest.raises(ValueError, match=f"neither in {home}, .* nor here"):
        directories.read_located_config(path)


def test_names_are_no_paths(begun, monkeypatch):
    for name in ("arithmetic", "someone", "embedded"):
        (begun / name).mkdir()
    monkeypatch.chdir(begun)
    config = TrainConfig()
    directories.check_config(begun, config)
    record(begun).write("finished")
    assert directories.read_located_config(begun) == config
    hub = dataclasses.replace(TrainConfig(model="someone/model"), task="gsm8k")
    write_text(begun / "config.yaml", to_yaml(hub))
    record(begun, commit="0123").write("finished")
    assert directories.read_located_config(begun) == hub
