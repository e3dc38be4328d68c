"""A pretended cloud: gcloud and uv stand-ins on PATH, local folders as workers."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "tpu_setup"
SETTINGS = (
    "TPU_NAME PROJECT ZONE ACCELERATOR_TYPE RUNTIME_VERSION CAPACITY REQUEST BUCKET "
    "JAX_PLATFORMS JAX_COMPILATION_CACHE_DIR"
).split()
TARGET = ("--name", "my-tpu", "--project", "my-project", "--zone", "us-east5-b")

UV = """#!/bin/sh
echo "uv $*" >>"$HOME/uv.log"
[ "$1" = venv ] || exit 0
for folder; do :; done
mkdir -p "$folder/bin"
cat >"$folder/bin/python" <<'END'
#!/bin/sh
echo "python $*" >>"$HOME/uv.log"
[ -e "$1" ] || exit 2
END
printf '#!/bin/sh\\necho "trains with $*, $JAX_PLATFORMS"\\n' >"$folder/bin/grpo-jax"
chmod +x "$folder/bin/python" "$folder/bin/grpo-jax"
"""


class Cloud:
    """The pretended cloud of one test, with two workers."""

    def __init__(self, root: Path, repository: Path):
        self.root, self.repository = root, repository
        self.scripts = repository / "tpu_setup"
        (root / "log").touch()
        self.set_states(queue="-", node="-")
        for worker in range(2):
            (root / f"worker-{worker}").mkdir()
        (root / "bin").mkdir()
        (root / "bin/gcloud").symlink_to(HERE / "fake_gcloud.sh")
        self.stand_in("uv", UV)
        self.environment = {k: v for k, v in os.environ.items() if k not in SETTINGS}
        self.environment["FAKE_CLOUD"] = str(root)
        # Only tests of commands that end at once wait for them.
        self.environment["GRPO_JAX_WATCH"] = "0"
        self.environment["PATH"] = f"{root}/bin:{self.environment['PATH']}"

    def stand_in(self, name: str, text: str) -> None:
        """Makes a program that is found first."""
        (self.root / "bin" / name).write_text(text)
        (self.root / "bin" / name).chmod(0o755)

    def git(self, *arguments: str) -> str:
        """The output of a git command in the repository."""
        return git(self.repository, *arguments)

    def set_states(self, *, queue: str, node: str) -> None:
        """Sets what describe serves, one state per call."""
        (self.root / "queue").write_text("\n".join(queue.split()))
        (self.root / "node").write_text("\n".join(node.split()))

    def after_create(self, count: int, *, queue: str = "ACTIVE", node: str = "READY"):
        """Sets what describe serves after the given create."""
        (self.root / f"create_{count}").write_text("\n".join(queue.split()) + "\n")
        (self.root / f"node_{count}").write_text("\n".join(node.split()))

    def run(
        self, script: str, *arguments: str, target=TARGET, answer="", **environment
    ):
        """The finished process of one script."""
        return subprocess.run(
            [self.scripts / f"{script}.sh", *target, *arguments],
            env={**self.environment, **environment},
            input=answer,
            text=True,
            capture_output=True,
            timeout=600,
        )

    def calls(self, verb: str | None = None) -> list[list[str]]:
        """The arguments of every gcloud call so far, or of those with this verb."""
        log = (self.root / "log").read_text()
        calls = [call.split("\x1f")[:-1] for call in log.split("\x1e")[:-1]]
        return [call for call in calls if verb is None or call[3:4] == [verb]]

    def worker(self, index: int) -> Path:
        """The grpo-jax folder of a worker."""
        return self.root / f"worker-{index}" / "grpo-jax"

    def kill_runs(self) -> None:
        """Ends whatever the test left running on the workers."""
        for pid in self.root.glob("worker-*/grpo-jax/run/pid"):
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass


def git(folder: Path, *arguments: str) -> str:
    """The output of a git command, with an identity and without the user's settings."""
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    return subprocess.run(
        ["git", "-C", folder, *identity, *arguments],
        env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull},
        check=True,
        text=True,
        capture_output=True,
    ).stdout.strip()


@pytest.fixture
def cloud(tmp_path):
    """A cloud without a TPU, and a small repository that holds the scripts."""
    repository = tmp_path / "repository"
    shutil.copytree(
        SCRIPTS, repository / "tpu_setup", ignore=shutil.ignore_patterns("env.sh")
    )
    (repository / "settings.txt").write_text("first\n")
    (tmp_path / "cloud").mkdir()
    cloud = Cloud(tmp_path / "cloud", repository)
    yield cloud
    cloud.kill_runs()


@pytest.fixture
def committed(cloud):
    """The same with its files committed, as the scripts that send code need it."""
    cloud.git("init", "--quiet")
    cloud.git("add", "--all")
    cloud.git("commit", "--quiet", "--message=first")
    cloud.revision = cloud.git("rev-parse", "HEAD")
    return cloud
