"""What users get: a light import, public names that exist, a complete wheel."""

import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

import grpo_jax

ROOT = pathlib.Path(__file__).parents[1]
ASSETS = ROOT / "grpo_jax" / "assets"

# What each import has loaded by then; one process, as each start takes long.
STAGES = """
import json, sys

def loaded():
    return sorted({name.partition(".")[0] for name in sys.modules})

stages = {}
import grpo_jax
stages["package"] = loaded()
import grpo_jax.cli
stages["command line"] = loaded()
import grpo_jax.tasks, grpo_jax.rewards.runner
stages["rewards and tasks"] = loaded()
grpo_jax.group_softmax_weights
stages["objective"] = loaded()
print(json.dumps(stages))
"""

HEAVY = {
    "datasets",
    "gguf",
    "huggingface_hub",
    "matplotlib",
    "orbax",
    "reasoning_gym",
    "skyrl_gym",
    "tensorboardX",
    "textarena",
    "tokenizers",
    "torch",
    "transformers",
    "wandb",
}


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def stages():
    # On a platform that does not exist, starting a backend would be an error.
    done = run_python("-c", STAGES, JAX_PLATFORMS="no_such_platform")
    assert (done.returncode, done.stderr) == (0, "")
    return {name: set(found) for name, found in json.loads(done.stdout).items()}


def test_importing_the_package_loads_no_library(stages):
    assert not stages["package"] & ({"jax", "flax", "numpy", "optax", "tyro"} | HEAVY)


@pytest.mark.parametrize("stage", ["command line", "rewards and tasks"])
def test_what_a_reward_worker_imports_loads_no_jax(stages, stage):
    assert not stages[stage] & ({"jax", "jaxlib", "flax", "optax"} | HEAVY)


def test_the_objective_loads_jax_and_nothing_heavy(stages):
    assert "jax" in stages["objective"]
    assert not stages["objective"] & (HEAVY | {"optax"})


@pytest.mark.parametrize("name", grpo_jax.__all__)
def test_every_public_name_exists(name):
    value = getattr(grpo_jax, name)
    assert value is not None
    # Functions and classes say what they are.
    assert isinstance(value, str) or value.__doc__


def test_a_public_name_is_the_object_of_its_module():
    from grpo_jax.objective import loss

    assert grpo_jax.grpo_loss is loss.grpo_loss
    assert dir(grpo_jax) == sorted(grpo_jax.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'grpo_los'"):
        _ = grpo_jax.grpo_los


def test_everything_the_objective_offers_can_be_had_from_it():
    objective = importlib.import_module("grpo_jax.objective")
    assert set(objective.__all__) <= set(vars(objective))


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert grpo_jax.__version__ == project["version"]
    assert f"version: {grpo_jax.__version__}" in citation


def test_the_package_runs_as_a_module():
    done = run_python("-m", "grpo_jax", "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "grpo-jax" in done.stdout and "train" in done.stdout


def built_wheel(source, out):
    """A wheel made from a copy of the sources, so that the checkout stays clean."""
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("grpo_jax", "tests", "experiments"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    command = ["-m", "pip", "wheel", "--no-deps", "--wheel-dir", out]
    built = run_python(*command, source)
    if "No matching distribution found for setuptools" in built.stderr:
        pytest.skip("the build needs setuptools from a package registry")
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


def check_contents(wheel):
    """The wheel holds all of the package and nothing else."""
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    info = f"grpo_jax-{grpo_jax.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"grpo_jax", info}
    package = ROOT / "grpo_jax"
    files = [*package.rglob("*.py"), *(package / "assets").rglob("*")]
    wanted = {path.relative_to(ROOT).as_posix() for path in files if path.is_file()}
    assert wanted | {"grpo_jax/py.typed"} <= names
    entries = archive.read(f"{info}/entry_points.txt").decode()
    assert entries.split("\n")[:2] == [
        "[console_scripts]",
        "grpo-jax = grpo_jax.cli:main",
    ]


def installed(wheel, place):
    """The site-packages of a new environment with the wheel in it.

    Its dependencies are those of this environment, whose editable install stays behind:
    links in a folder that a link names are not followed.
    """
    venv.create(place)
    command = ["-m", "pip", "--python", place, "install", "--no-deps", "--no-index"]
    # What lies beside the sources would be taken for an installation.
    done = run_python(*command, wheel, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    (packages,) = place.glob("lib/python*/site-packages")
    links = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(links))
    return packages


# One test, since the wheel takes longest: workers would build one each.
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip")
def test_the_wheel_is_whole_and_runs_without_the_sources(tmp_path_factory):
    wheel = built_wheel(tmp_path_factory.mktemp("code"), tmp_path_factory.mktemp("out"))
    check_contents(wheel)
    place, empty = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("empty")
    packages = installed(wheel, place)

    def run(*command):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            command, env=environment, cwd=empty, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    version = f"grpo-jax {grpo_jax.__version__}\n"
    assert run(place / "bin" / "grpo-jax", "--version") == version
    python = place / "bin" / "python"
    assert run(python, "-m", "grpo_jax", "--version") == version
    program = "import grpo_jax as g; print(g.__file__, g.load_pretrained('embedded'))"
    assert run(python, "-c", program).startswith(str(packages))
    assert not list(empty.iterdir())


def test_the_embedded_model_comes_with_the_package():
    names = {path.name for path in (ASSETS / "arithmetic-1m").glob("*")}
    if not names:
        pytest.skip("the embedded model has not been made")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
