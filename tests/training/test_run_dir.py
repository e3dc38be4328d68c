"""A run directory has one owner, one configuration, and no secrets in it."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st

from grpo_jax.config import (
    CheckpointConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReportConfig,
    TrainConfig,
)
from grpo_jax.config.files import load_config
from grpo_jax.config.validation import to_dict
from grpo_jax.parallel import mesh as meshes
from grpo_jax.training import _manifest as manifest_module
from grpo_jax.training import _run_dir as directories
from grpo_jax.training._manifest import Origin, Record

SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")


def begun(path):
    """Make the directory look like that of a run that has made a step."""
    (path / "metrics.jsonl").write_text('{"step": 1}\n')


def write_yaml(path, text):
    file = path / "config.yaml"
    file.write_text(text)
    return file


# --- The path


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("arithmetic", "arithmetic"),
        ("data/my rows.jsonl", "my-rows"),
        ("reasoning_gym:countdown", "reasoning_gym-countdown"),
        ("…", "run"),
    ],
)
def test_a_task_names_a_folder(task, name):
    assert directories.run_path(None, task) == pathlib.Path("runs") / name


# --- The lock


def test_a_second_claim_is_refused_while_the_first_holds(tmp_path):
    path = tmp_path / "deep" / "run"
    with directories.claim(path):
        assert path.is_dir()
        with pytest.raises(ValueError, match=f"{path} is in use by another run"):
            with directories.claim(path):
                pytest.fail("two runs work in one directory")
    with directories.claim(path):
        pass


def test_the_lock_of_a_run_that_failed_is_free(tmp_path):
    with pytest.raises(KeyError):
        with directories.claim(tmp_path):
            raise KeyError
    with directories.claim(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    hold = (
        "import fcntl, os, signal, sys\n"
        "lock = open(sys.argv[1], 'a')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "signal.pause()\n"
    )
    command = [sys.executable, "-c", hold, tmp_path / "run.lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="in use"):
            with directories.claim(tmp_path):
                pytest.fail("the lock is held by another process")
        process.kill()
        process.wait()
    with directories.claim(tmp_path):
        pass


@pytest.mark.parametrize("below", ["", "run"])
def test_a_directory_that_cannot_be_written_is_named(tmp_path, below):
    # A file in the way stops root as well, whom permissions do not.
    file = tmp_path / "file"
    file.write_text("")
    path = file / below if below else file
    with pytest.raises(ValueError, match=f"run_dir {path} cannot be written .*choose"):
        with directories.claim(path):
            pytest.fail("it was claimed")


# --- The configuration


def test_a_new_run_saves_its_configuration(tmp_path):
    config = TrainConfig(
        steps=7, optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=3)
    )
    directories.check_config(tmp_path, config)
    assert directories.read_config(tmp_path) == config
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved == to_dict(config)


def test_another_configuration_is_refused_with_the_fields_that_differ(tmp_path):
    directories.check_config(tmp_path, TrainConfig(seed=1))
    begun(tmp_path)
    other = TrainConfig(seed=2, objective=ObjectiveConfig(kl_coef=0.0))
    with pytest.raises(ValueError) as caught:
        directories.check_config(tmp_path, other)
    message = str(caught.value)
    assert message.startswith("use another run_dir (--run-dir), or ")
    assert message.splitlines()[1:] == [
        "  objective.kl_coef: 0.04 and 0.0",
        "  seed: 1 and 2",
    ]
    assert directories.read_config(tmp_path).seed == 1


@pytest.mark.parametrize(
    "change",
    [
        {"run_dir": "elsewhere"},
        {"mesh": MeshConfig(data=2, num_processes=4, process_id=3, mode="pmap")},
        {"report": ReportConfig(log_every=7, tensorboard=True)},
        {"checkpoint": CheckpointConfig(every=7, keep=1)},
        {"microbatch_size": 8, "remat": "layer"},
    ],
)
def test_where_and_how_a_run_goes_on_does_not_make_it_another(tmp_path, change):
    config = TrainConfig()
    directories.check_config(tmp_path, config)
    begun(tmp_path)
    directories.check_config(tmp_path, dataclasses.replace(config, **change))
    assert directories.read_config(tmp_path) == config


@pytest.mark.parametrize("change", [{"microbatch_size": 8}, {"packing": "off"}])
def test_how_sequences_are_grouped_stays_where_experts_are_balanced(tmp_path, change):
    objective = ObjectiveConfig(router_aux_loss_coef=0.01)
    config = TrainConfig(objective=objective)
    directories.check_config(tmp_path, config)
    begun(tmp_path)
    with pytest.raises(ValueError, match=next(iter(change))):
        directories.check_config(tmp_path, dataclasses.replace(config, **change))


def test_the_best_step_is_that_of_the_metric_the_run_began_with(tmp_path):
    # `--step best` reads it from the file of the run.
    directories.check_config(tmp_path, TrainConfig())
    begun(tmp_path)
    other = TrainConfig(checkpoint=CheckpointConfig(keep_best="loss", best_mode="min"))
    with pytest.raises(ValueError, match="checkpoint.keep_best: None and 'loss'"):
        directories.check_config(tmp_path, other)


@pytest.mark.parametrize(
    ("name", "there", "here", "same"),
    [
        (None, "max", None, True),  # as files of earlier versions say
        ("reward", "max", None, True),
        ("loss", None, "min", True),
        ("loss", "max", None, False),
        ("entropy", "min", "max", False),
    ],
)
def test_the_best_value_is_compared_by_what_it_means(tmp_path, name, there, here, same):
    def config(mode):
        checkpoint = CheckpointConfig(keep_best=name, best_mode=mode)
        return TrainConfig(checkpoint=checkpoint)

    directories.check_config(tmp_path, config(there))
    begun(tmp_path)
    refused = pytest.raises(ValueError, match="best_mode: 'm..' and 'm")
    with contextlib.nullcontext() if same else refused:
        directories.check_config(tmp_path, config(here))


def test_a_preset_in_a_file_means_its_fields(tmp_path):
    text = "objective: {preset: grpo, kl_coef: 0.5}"
    config = load_config(write_yaml(tmp_path, text))
    grpo = ObjectiveConfig.preset("grpo")
    assert config.objective == dataclasses.replace(grpo, kl_coef=0.5)
    with pytest.raises(ValueError, match="'ppo' is unknown; use one of softmax"):
        load_config(write_yaml(tmp_path, "objective: {preset: ppo}"))


def test_more_steps_continue_a_run_with_a_constant_rate(tmp_path):
    config = TrainConfig(steps=5)
    directories.check_config(tmp_path, config)
    begun(tmp_path)
    directories.check_config(tmp_path, TrainConfig(steps=8, microbatch_size=8))
    assert directories.read_config(tmp_path) == TrainConfig(steps=8)


def test_fewer_steps_end_a_run_with_a_constant_rate_unless_more_are_done(tmp_path):
    directories.check_config(tmp_path, TrainConfig(steps=8))
    for step in (4, 6):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    words = "steps: 8 and 5\n6 steps are done: steps may be 6 or more"
    with pytest.raises(ValueError, match=words):
        directories.check_config(tmp_path, TrainConfig(steps=5))
    with pytest.raises(ValueError, match="seed: 0 and 1$"):
        directories.check_config(tmp_path, TrainConfig(steps=7, seed=1))
    assert directories.read_config(tmp_path) == TrainConfig(steps=8)
    for steps in (7, 6, 9):
        directories.check_config(tmp_path, TrainConfig(steps=steps))
        assert directories.read_config(tmp_path) == TrainConfig(steps=steps)


def test_more_steps_are_another_run_where_the_rate_depends_on_them(tmp_path):
    falling = OptimizerConfig(learning_rate=1e-3, schedule="linear")
    directories.check_config(tmp_path, TrainConfig(steps=5, optimizer=falling))
    begun(tmp_path)
    with pytest.raises(ValueError, match="steps: 5 and 8"):
        directories.check_config(tmp_path, TrainConfig(steps=8, optimizer=falling))


def test_other_data_are_refused_and_unknown_data_are_not(tmp_path):
    mesh = meshes.make_mesh(MeshConfig())
    config = TrainConfig()
    data = {"task": "dataset", "rows": 3, "rewards": {"short": "1"}}
    directories.check_config(tmp_path, config, data)
    begun(tmp_path)
    directories.check_config(tmp_path, config, data)  # no manifest yet
    record = Record(tmp_path, config.seed, mesh, Origin())
    record.check(data)
    record.write("running")
    directories.check_config(tmp_path, config, data)
    directories.check_config(tmp_path, config, data | {"rewards": {"long": "2"}})
    other = data | {"rows": 4}
    with pytest.raises(ValueError, match="configuration .*\n  rows: 3 and 4\n"):
        directories.check_config(tmp_path, config, other)
    # Other fields may choose other rows, so the rows are not to be brought back.
    with pytest.raises(ValueError, match="seed: 0 and 1\n  rows: 3 and 4$"):
        directories.check_config(tmp_path, TrainConfig(seed=1), other)
    (tmp_path / "manifest.json").write_text("{}")  # of a version that did not say
    directories.check_config(tmp_path, config, other)


def test_a_run_that_never_began_may_be_followed_by_another(tmp_path):
    # As after `--model` with a misspelled name: an empty log is all there is.
    directories.check_config(tmp_path, TrainConfig(model="misspelled"))
    (tmp_path / "metrics.jsonl").touch()
    directories.check_config(tmp_path, TrainConfig())
    assert directories.read_config(tmp_path) == TrainConfig()


def test_a_checkpoint_makes_a_run_even_without_metrics(tmp_path):
    directories.check_config(tmp_path, TrainConfig(seed=1))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="seed: 1 and 2"):
        directories.check_config(tmp_path, TrainConfig(seed=2))


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no run"):
        directories.read_config(tmp_path)


def test_fields_left_out_of_a_file_suit_its_model(tmp_path):
    text = "model: some/model\noptimizer: {warmup_steps: 4}\n"
    config = load_config(write_yaml(tmp_path, text))
    assert config == TrainConfig(
        model="some/model", optimizer=OptimizerConfig(warmup_steps=4)
    )
    config = load_config(write_yaml(tmp_path, "optimizer: {warmup_steps: 4}"))
    # The embedded model keeps its own learning rate beside the warm-up that is given.
    assert config.optimizer == OptimizerConfig(learning_rate=2e-4, warmup_steps=4)


def test_another_model_gets_its_own_defaults_but_keeps_what_the_file_says(tmp_path):
    file = write_yaml(tmp_path, "group_size: 4\nmax_new_tokens: 99\n")
    config = load_config(file, model="some/model")
    assert config == TrainConfig(model="some/model", group_size=4, max_new_tokens=99)
    assert config.optimizer.learning_rate == 1e-6
    # A complete file leaves nothing to fill in.
    file = write_yaml(tmp_path, yaml.safe_dump(to_dict(TrainConfig(seed=3))))
    config = load_config(file, model="some/model")
    assert config == dataclasses.replace(TrainConfig(seed=3), model="some/model")


def test_an_empty_file_is_the_default_run(tmp_path):
    assert load_config(write_yaml(tmp_path, "# nothing")) == TrainConfig()


@pytest.mark.parametrize(
    "number", ["1e-6", "1E-6", "1.0e-6", "+1e-6", "0.000001", "1.e-6"]
)
def test_numbers_may_be_written_as_people_write_them(tmp_path, number):
    file = write_yaml(tmp_path, f"optimizer: {{learning_rate: {number}}}")
    assert load_config(file).optimizer.learning_rate == 1e-6


def test_texts_that_look_like_numbers_stay_texts(tmp_path):
    file = write_yaml(tmp_path, "model: a1e3\ndata: '1e3'\nrun_dir: e5\n")
    config = load_config(file)
    assert (config.model, config.data, config.run_dir) == ("a1e3", "1e3", "e5")


# All that a path or a name may hold: also the bytes of a file name that is no UTF-8.
_TEXTS = st.text(st.characters(exclude_characters="\0"), min_size=1)
_LIKE_NUMBERS = st.from_regex(r"[-+]?[0-9_.:]*([eE][-+]?[0-9]+)?", fullmatch=True)


@given(text=_TEXTS | _LIKE_NUMBERS.filter(bool))
@example(text="1e-5")
@example(text="1e3")
@example(text="+1.e5")
@example(text="1:30")
@example(text="no")
@example(text="\udc80\x85\u2028 ")
def test_any_text_comes_back_as_it_was_given(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "texts"
    path.mkdir(exist_ok=True)
    assume("://" not in text)
    best = CheckpointConfig(keep_best=text)
    config = TrainConfig(data=text, run_dir=text, model=text, checkpoint=best)
    directories.check_config(path, config)
    assert directories.read_config(path) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: b: c", "cannot be read as YAML: mapping values are not allowed"),
        ("steps: [1", "cannot be read as YAML"),
        ("model: !!python/object:os.system {}", "cannot be read as YAML: could not"),
        ("- 1\n- 2", "must hold a mapping of fields"),
        ("7", "must hold a mapping of fields"),
        ("stepz: 3", "stepz is not a field .* did you mean 'steps'"),
        ("mesh: {fdsp: 3}", "mesh.fdsp is not a field .* did you mean 'fsdp'"),
        ("mesh: 3", "mesh must be a mapping"),
        ("steps: ten", "steps must be an integer from 1 on, got 'ten'"),
        ("model: 3", "model must be a text"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_config(write_yaml(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path):
    with pytest.raises(ValueError, match="missing.yaml cannot be read"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\xff\xfe\x00")
    with pytest.raises(ValueError, match="model.gguf cannot be read as YAML"):
        load_config(tmp_path / "model.gguf")


# --- The manifest


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, f"secret-of-{name}")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.setattr(sys, "argv", ["grpo-jax", "train", "--steps", "3"])
    # Whether this CPU is one of those must not matter.
    monkeypatch.setattr(manifest_module, "has_bfloat16_products", lambda: True)
    config = TrainConfig(seed=11, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    mesh = meshes.make_mesh(config.mesh)
    Record(tmp_path, config.seed, mesh, Origin()).write("running")
    return json.loads((tmp_path / "manifest.json").read_text())


def test_the_manifest_says_where_and_with_what_a_run_ran(manifest):
    assert manifest["status"] == "running"
    assert manifest["command"] == ["grpo-jax", "train", "--steps", "3"]
    assert manifest["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert manifest["devices"] == ["cpu:cpu with fast bfloat16"] * 8
    assert (manifest["backend"], manifest["processes"]) == ("cpu", 1)
    assert manifest["seed"] == 11
    assert manifest["versions"]["jax"] == jax.__version__
    assert None not in manifest["versions"].values()
    assert manifest["python"] == ".".join(map(str, sys.version_info[:3]))
    assert manifest["environment"]["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"
    assert manifest["time"].endswith("+00:00")


def test_no_secret_and_no_other_variable_is_kept(tmp_path, manifest):
    text = (tmp_path / "manifest.json").read_text()
    assert "secret-of" not in text
    assert not [name for name in SECRETS if name in text]
    allowed = {"XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64"}
    assert set(manifest["environment"]) <= allowed


# --- The revision of the code


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the code without its history, which the manifest looks at."""
    module = tmp_path / "copy" / "grpo_jax" / "training" / "run_dir.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(manifest_module, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return tmp_path / "copy"


def revision(tmp_path):
    mesh = meshes.make_mesh(MeshConfig())
    Record(tmp_path, 0, mesh, Origin()).write("running")
    return json.loads((tmp_path / "manifest.json").read_text())["git_revision"]


def test_a_copy_without_history_has_its_revision_in_a_file(tmp_path, copied):
    assert revision(tmp_path) is None
    (copied / "REVISION").write_text("0123abcd-dirty\n")
    assert revision(tmp_path) == "0123abcd-dirty"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_checkout_tells_its_commit_and_whether_files_differ(tmp_path, copied):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", *identity, *arguments]
        done = subprocess.run(command, cwd=copied, capture_output=True, check=True)
        return done.stdout.decode().strip()

    (copied / "code.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "One")
    git("tag", "-a", "v1", "-m", "One")  # a tag must not stand in for the commit
    commit = git("rev-parse", "HEAD")
    assert revision(tmp_path) == commit
    (copied / "code.py").write_text("a = 2\n")
    assert revision(tmp_path) == f"{commit}-dirty"
