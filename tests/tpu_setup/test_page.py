"""The commands of the pages, run as they are printed, and the bucket of one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "tpu_setup/README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
OWN = ROOT / "experiments/custom_reward.py"

# What a reader answers in the editor.
EDITOR = """#!/bin/sh
sed -i -e 's/^TPU_NAME=/&my-tpu/' -e 's/^PROJECT=/&my-project/' \
  -e 's/^ZONE=/&us-east5-b/' -e 's/^ACCELERATOR_TYPE=/&v5litepod-8/' \
  -e 's,^BUCKET=,&gs://my-bucket,' "$1"
"""
# A mounted bucket is a folder here. Following a log would never end.
GCSFUSE = '#!/bin/sh\necho "$*" >>"$HOME/mounts"\n'
TAIL = f'#!/bin/bash\nexec {shutil.which("tail")} "${{@/#-F/--}}"\n'
# The agent of ssh prints variables of the shell.
QUIET = "#!/bin/sh\n"


def steps(first: str, last: str) -> str:
    """The program of the fences between two headings of the page."""
    part = PAGE[PAGE.index(first) : PAGE.index(last)]
    return "\n".join(fence for fence in FENCES if fence in part)


@pytest.fixture
def reader(committed):
    """A reader's machine, with a cloud and a script with a reward of their own."""
    (committed.repository / "experiments").mkdir()
    shutil.copy(OWN, committed.repository / "experiments")
    committed.git("add", "--all")
    for name, text in {"edit": EDITOR, "gcsfuse": GCSFUSE, "tail": TAIL}.items():
        committed.stand_in(name, text)
    for name in ("grpo-jax", "pip", "tensorboard", "python"):
        committed.stand_in(name, f'#!/bin/sh\necho "$*" >>{committed.root}/called\n')
    for name in ("ssh-keygen", "ssh-agent", "ssh-add"):
        committed.stand_in(name, QUIET)
    committed.stand_in("mountpoint", "#!/bin/sh\nexit 1\n")
    committed.environment |= {"EDITOR": "edit", "GRPO_JAX_WATCH": "600"}
    return committed


def follow(reader, program: str) -> subprocess.CompletedProcess:
    """What a shell says to the commands, each of which has to succeed."""
    return subprocess.run(
        ["bash", "-e"],
        input=program,
        cwd=reader.repository,
        env=reader.environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_page_leads_from_an_empty_project_to_a_finished_run(reader):
    program = steps("**1. Write the settings", "**6. On spot capacity")
    done = follow(reader, program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("state=finished rc=0") == 2
    homes = [reader.worker(index).parent for index in range(2)]
    for home in homes:
        log = (home / "grpo-jax/logs/latest.log").read_text()
        assert "--run-dir gs://my-bucket/runs/first" in log
    own = follow(reader, steps("### My own", "### A run in a bucket"))
    assert own.returncode == 0, own.stderr
    for home in homes:
        assert "python mine.py --run-dir gs://my-bucket/runs/mine\n" in (
            home / "uv.log"
        ).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_goes_on_after_a_preemption_and_cleans_up(reader):
    """And what it does on the worker, with the token of a gated model and an event."""
    home = reader.root / "home"
    (home / ".cache/huggingface").mkdir(parents=True)
    (home / ".cache/huggingface/token").write_text("secret")
    reader.environment["HOME"] = str(home)
    program = (
        steps("**1. Write the settings", "**2. Log in")
        + steps("### On the worker", "## Cost, quota")
        + steps("**6. On spot capacity", "### My own")
        + steps("## Troubleshooting", "## GPU boxes")
    )
    done = follow(reader, program.replace("tpu_setup/delete", "yes | tpu_setup/delete"))
    assert done.returncode == 0, done.stderr
    assert "--spot" in {word for call in reader.calls("create") for word in call}
    assert reader.calls("delete")
    assert any("simulate-maintenance-event" in call for call in reader.calls())
    assert (reader.repository / "logs").is_dir()
    called = (reader.root / "called").read_text()
    assert "report gs://my-bucket/runs/first" in called
    assert "--logdir events" in called


@pytest.mark.slow
def test_the_page_of_boxes_and_slurm_and_the_page_of_tpus_name_what_there_is(reader):
    """The commands begin with programs that are there, or that they install."""
    tpus = (ROOT / "docs/tpu.md").read_text(encoding="utf-8")
    fences = re.findall(r"^```sh\n(.*?)^```", tpus, re.MULTILINE | re.DOTALL)
    program = "\n".join(fences) + steps("## GPU boxes", "## GKE")
    (reader.repository / ".venv").mkdir()
    done = follow(reader, program.replace("srun ", "").replace(".venv/bin/", ""))
    assert done.returncode == 0, done.stderr
    called = (reader.root / "called").read_text()
    assert "train --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --run-dir gs://" in (
        called
    )
    assert called.count("check_devices.py --platform") == 2
    assert "plan --model Qwen/Qwen2.5-0.5B-Instruct --compile v5e:2x4" in called


def test_the_page_sets_what_it_uses_before():
    known = {"HOME", "EDITOR"}
    example = (ROOT / "tpu_setup/env.sh.example").read_text(encoding="utf-8")
    for fence in FENCES:
        if "source tpu_setup/env.sh" in fence:
            known |= set(re.findall(r"^([A-Z_]+)=", example, re.MULTILINE))
        known |= set(re.findall(r"^([A-Z_]+)=", fence, re.MULTILINE))
        assert set(re.findall(r"\$\{?([A-Za-z_]+)", fence)) <= known, fence


@pytest.fixture
def mount(reader, tmp_path):
    def run(*arguments):
        return subprocess.run(
            ["bash", reader.scripts / "mount_bucket.sh", *arguments],
            env=reader.environment | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    return run


def test_a_bucket_is_mounted_once_and_left_as_it_was(reader, mount, tmp_path):
    folder = tmp_path / "bucket"
    assert mount("gs://my-bucket", folder).returncode == 0
    reader.stand_in("mountpoint", "#!/bin/sh\nexit 0\n")
    assert mount("gs://my-bucket", folder).returncode == 0
    assert len((tmp_path / "mounts").read_text().splitlines()) == 1
    assert list(folder.iterdir()) == []


def test_a_bucket_that_does_not_rename_folders_is_refused(reader, mount, tmp_path):
    reader.stand_in("mv", "#!/bin/sh\necho 'mv: too many open files' >&2; exit 1\n")
    done = mount("gs://my-bucket", tmp_path / "bucket")
    assert done.returncode == 1
    assert "does not rename folders" in done.stderr
    assert "--enable-hierarchical-namespace" in done.stderr


@pytest.mark.parametrize("bucket", ["my-bucket", "gs://", "gs://b'; ls", "gs://a/b"])
def test_what_is_no_bucket_is_not_mounted(mount, tmp_path, bucket):
    done = mount(bucket, tmp_path / "bucket")
    assert done.returncode == 1 and "gs://BUCKET" in done.stderr
    assert not (tmp_path / "mounts").exists()
