"""Flags, settings, refusals and dry runs; shellcheck and gcloud's own linter."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ["create", "install", "sync", "run", "status", "babysit", "delete"]
V5E = ("--type", "v5litepod-8")

DRY_RUNS = [
    ("create", *V5E),
    ("create", *V5E, "--spot", "--valid-until", "6h"),
    ("create", "--type", "v4-8", "--direct", "--spot"),
    ("create", "--type", "v5p-8", "--on-demand", "--runtime", "v2-alpha-tpuv5"),
    ("install", "--type", "v6e-16", "--bucket", "gs://my-bucket/check"),
    ("sync",),
    ("run", "--", "grpo-jax", "train", "--run-dir", "gs://my-bucket/it's $HOME;"),
    ("run", "--stop"),
    ("status", "--lines", "5", "--follow", "--collect", "logs"),
    ("babysit", *V5E, "--spot", "--", "grpo-jax", "train"),
    ("delete",),
]


def dry_run_lines(cloud) -> list[str]:
    lines = []
    for script, *arguments in DRY_RUNS:
        done = cloud.run(script, "--dry-run", *arguments)
        assert done.returncode == 0, done.stderr
        lines += done.stdout.splitlines()
    return lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_the_usage_and_runs_nothing(cloud, script):
    done = cloud.run(script, "--help", target=())
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: {script}.sh")
    for flag in ("--name", "--project", "--zone", "--type", "--dry-run"):
        assert flag in done.stdout
    assert cloud.calls() == []


def test_dry_run_prints_gcloud_lines_and_runs_nothing(cloud):
    for line in dry_run_lines(cloud):
        assert shlex.split(line)[:3] == ["gcloud", "compute", "tpus"]
        assert "--project=my-project" in line and "--zone=us-east5-b" in line
    assert cloud.calls() == []
    assert not (cloud.repository / "logs").exists()


UNSAFE = [
    ("name", "x;touch canary"),
    ("project", "p`touch canary`"),
    ("zone", "us-east5-b && touch canary"),
    ("type", "v4-8|touch canary"),
]
MORE_UNSAFE = ["$(touch canary)", "-x", "a\ntouch canary", "Upper", "a b", "\u00e9"]


@pytest.mark.parametrize(
    "script, field, value",
    [(script, *case) for script in SCRIPTS for case in UNSAFE]
    + [("create", "name", value) for value in MORE_UNSAFE],
)
def test_unsafe_values_are_refused_before_anything_runs(cloud, script, field, value):
    good = {"name": "my-tpu", "project": "my-project", "zone": "us-east5-b"}
    target = {**good, "type": "v4-8", field: value}
    done = cloud.run(script, target=[f"--{key}={word}" for key, word in target.items()])
    assert done.returncode == 2
    assert f"{field} " in done.stderr and "is not valid" in done.stderr
    assert cloud.calls() == []
    assert list(Path.cwd().glob("canary")) + list(cloud.root.rglob("canary")) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_or_unknown_argument_is_named(cloud, script):
    assert "--name" in cloud.run(script, target=()).stderr
    done = cloud.run(script, "--bogus")
    assert done.returncode == 2 and "--bogus" in done.stderr
    assert cloud.calls() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("install", "--bucket", "gs://b'; rm -rf x"),
        ("install", "--extras", "tpu;ls"),
        ("create", *V5E, "--runtime", "$(ls)"),
        ("create", *V5E, "--poll", "a[$(ls)]"),
        ("babysit", *V5E, "--max-retries", "x"),
        ("status", "--lines", "1;ls"),
        ("run", "--", "--steps", "3"),
        ("sync", "--", "ls"),
    ],
)
def test_other_unsafe_or_misplaced_values_are_refused(cloud, arguments):
    assert cloud.run(*arguments).returncode == 2
    assert cloud.calls() == []


@pytest.mark.parametrize("kind", ["tpu7x-8", "v7x-8"])
def test_tpu7x_is_refused_with_a_pointer(cloud, kind):
    done = cloud.run("create", "--type", kind)
    assert done.returncode == 2
    assert "GKE" in done.stderr and "README.md" in done.stderr


@pytest.mark.parametrize(
    "kind, name, runtime",
    [
        ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
        ("v5e-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-16", "v5p-16", "v2-alpha-tpuv5"),
        ("v6e-4", "v6e-4", "v2-alpha-tpuv6e"),
    ],
)
def test_the_type_chooses_the_runtime(cloud, kind, name, runtime):
    queued = cloud.run("create", "--type", kind, "--dry-run").stdout
    assert f"--accelerator-type={name} --runtime-version={runtime} " in queued
    direct = cloud.run("create", "--type", kind, "--dry-run", "--direct").stdout
    assert f"--accelerator-type={name} --version={runtime} " in direct


@pytest.mark.parametrize(
    "kind, devices, processes",
    [  # v4 and v5p count cores, two to a chip; four chips to a host
        ("v4-8", 4, 1),
        ("v5p-32", 16, 4),
        ("v5litepod-4", 4, 1),
        ("v5litepod-8", 8, 1),
        ("v6e-16", 16, 4),
    ],
)
def test_install_expects_the_devices_of_the_type(cloud, kind, devices, processes):
    lines = cloud.run("install", "--type", kind, "--dry-run").stdout
    words = shlex.split(lines.splitlines()[-1])[-1]
    assert words.endswith(f"--devices {devices} --processes {processes}")


def test_flags_win_over_the_environment_and_that_over_the_file(cloud):
    (cloud.scripts / "env.sh").write_text(
        "TPU_NAME=file\nPROJECT=file-p\nZONE=us-file1-a\n"
    )
    done = cloud.run(
        "sync",
        "--dry-run",
        "--name",
        "flag",
        target=(),
        PROJECT="env-p",
        TPU_NAME="env",
    )
    line = done.stdout.splitlines()[0]
    assert (
        " flag: " in line and "--project=env-p" in line and "--zone=us-file1-a" in line
    )


def test_the_example_settings_name_every_setting(cloud):
    text = (cloud.scripts / "env.sh.example").read_text()
    library = (cloud.scripts / "lib.sh").read_text()
    settings = re.search(r'SETTINGS="(.*)"', library)
    assert settings is not None
    assert set(re.findall(r"^([A-Z_]+)=", text, re.M)) == set(settings[1].split())


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    folder = ROOT / "tpu_setup"
    files = [*folder.glob("*.sh"), folder / "env.sh.example"]
    done = subprocess.run([program, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def readme_lines() -> list[str]:
    """Every gcloud command in the README's fences, with values for its variables."""
    text = (ROOT / "tpu_setup/README.md").read_text()
    values = {"TPU_NAME": "my-tpu", "PROJECT": "my-project", "ZONE": "us-east5-b"}
    values |= {"BUCKET": "gs://my-bucket", "REGION": "us-east5", "NUMBER": "123"}
    lines = []
    for fence in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        for line in fence.replace("\\\n", " ").splitlines():
            line = re.sub(r"^[A-Z]+=\$\((.*)\)$", r"\1", line)  # NAME=$(gcloud ...)
            if line.startswith("gcloud "):
                lines.append(re.sub(r"\$\{?(\w+)\}?", lambda m: values[m[1]], line))
    return lines


def test_gcloud_accepts_every_command(cloud, tmp_path):
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    readme = readme_lines()
    assert len(readme) >= 5
    # From printf's quoting to the one that the linter reads.
    commands = [shlex.join(shlex.split(s)) for s in dry_run_lines(cloud) + readme]
    file = tmp_path / "commands.json"
    file.write_text(
        json.dumps([{"command_string": c} for c in dict.fromkeys(commands)])
    )
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}"],
        env={**os.environ, "CLOUDSDK_CONFIG": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == len(dict.fromkeys(commands))
    refused = [
        (r["command_string"], r["error_message"]) for r in results if not r["success"]
    ]
    assert refused == []
