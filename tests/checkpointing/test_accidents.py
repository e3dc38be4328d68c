"""A full disk, a killed process and a damaged part cost one save, never the run."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import optax

from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.config import CheckpointConfig
from grpo_jax.training.state import make_train_state, state_items, state_of

CHILD = """
import resource, signal, sys, os
from pathlib import Path
import jax, jax.numpy as jnp, optax
from grpo_jax.config import CheckpointConfig
from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.training.state import make_train_state, state_items, state_of

path = Path(sys.argv[1])
reports = []
checkpoints = Checkpoints(path, CheckpointConfig(keep=2), report=reports.append)
params = {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}
state = make_train_state(params, optax.adamw(1e-3))
"""

DISK_FULL = (
    CHILD
    + """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints.save(1, state_items(state), {}, wait=True)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
checkpoints.save(2, state_items(state), {})  # fails in the background
checkpoints.save(3, state_items(state), {}, wait=True)  # fails too
assert checkpoints.failed_saves == 2, checkpoints.failed_saves
assert checkpoints.steps() == [1]
assert [name.name for name in path.iterdir()] == ["1"]
assert "checkpoint 2 could not be saved" in reports[0], reports
assert "checkpoint 3 could not be saved" in reports[1], reports
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
checkpoints.save(4, state_items(state), {}, wait=True)
assert checkpoints.steps() == [1, 4] and checkpoints.failed_saves == 2
assert checkpoints.restore(state_items(state))[0] == 4
"""
)

SAVE_FOREVER = (
    CHILD
    + """
step = 0
while True:
    step += 1
    checkpoints.save(step, state_items(state), {"step": step})
    print(step, flush=True)
"""
)


def child(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def test_a_full_disk_costs_the_save_and_nothing_else(tmp_path):
    with child(DISK_FULL, tmp_path) as process:
        try:
            _, errors = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 0, errors[-3000:]


def test_a_process_killed_while_it_saves_leaves_a_good_checkpoint(tmp_path):
    process = child(SAVE_FOREVER, tmp_path)
    try:
        for line in process.stdout:
            if int(line) == 3:
                break
        deadline = time.monotonic() + 600
        while not list(tmp_path.glob("*orbax-checkpoint-tmp*")):
            assert time.monotonic() < deadline and process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    reports = []
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2), report=reports.append)
    params = {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}
    like = make_train_state(params, optax.adamw(1e-3))
    step, state, meta = checkpoints.restore(state_items(like))
    state = state_of(state)
    assert step >= 2 and meta == {"step": step} and reports == []
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        np.testing.assert_array_equal(leaf, wanted)
    # The next save clears what the killed one left.
    checkpoints.save(step + 1, state_items(state), {}, wait=True)
    assert {path.name for path in tmp_path.iterdir()} <= {
        str(s) for s in range(step + 2)
    }


TWO_PROCESSES = """
import errno, os, resource, signal, sys, threading
from pathlib import Path
import jax
path, port, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, process)
import numpy as np, optax
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import NamedSharding, PartitionSpec as P
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.futures.future import _SignalingThread as Writer
from grpo_jax.checkpointing import _corruption
from grpo_jax.config import CheckpointConfig, MeshConfig
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.checkpointing.checksum import params_sha256
from grpo_jax.training.state import make_train_state, state_items, state_of

sharding = NamedSharding(make_mesh(MeshConfig(fsdp=4)), P("fsdp"))
make = jax.jit(
    lambda: jax.random.normal(jax.random.key(0), (64, 512)), out_shardings=sharding
)
state = make_train_state({"w": make()}, optax.adamw(1e-3))
reports = []
config = CheckpointConfig(keep=2, keep_best="score", best_mode="max")
checkpoints = Checkpoints(path, config, report=reports.append)
for step in (1, 2, 3):
    checkpoints.save(step, state_items(state), {"step": step})
assert checkpoints.restore(state_items(state))[2] == {"step": 3}
if process == 0:  # the part that only process 1 reads
    files = (path / "3" / "params" / "ocdbt.process_1" / "d").iterdir()
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
sync_global_devices("damaged")
step, restored, _ = checkpoints.restore(state_items(state))
restored = state_of(restored)
assert step == 2 and len(reports) == 2, (step, reports)
checkpoints.save(3, state_items(restored), {"step": 33}, metrics={"score": 1.0})
step, restored, meta = checkpoints.restore(state_items(state))
restored = state_of(restored)
assert (step, meta, checkpoints.steps()) == (3, {"step": 33}, [2, 3])
print(params_sha256(restored.params))
print(params_sha256(state.params))

# One process has to repeat a read; the saves after it meet all the same.
if process == 1:
    load, _corruption.PAUSES = ocp.load_checkpointables, (0.0,)

    def fail_once(*given):
        load(*given)
        ocp.load_checkpointables = load
        raise OSError(errno.EIO, "away for a moment")

    ocp.load_checkpointables = fail_once
assert checkpoints.restore(state_items(state))[0] == 3

# The disk of process 1 is full, then that of process 0. What process 1 writes of this
# save is late: it comes when its part of the next save, of the same step, is written.
holds, late, released = False, [], threading.Event()
start, wait, tell = Writer.start, Writer._wait_for_signals, Writer._set_signals

def start_writer(writer):
    writer.late = holds
    late.extend([writer] * holds)
    start(writer)

def wait_for_folders(writer):
    wait(writer)
    if writer.late:
        released.wait()

def tell_that_it_wrote(writer):
    if not writer.late:
        released.set()
        for other in late:
            threading.Thread.join(other)
    tell(writer)

Writer.start, Writer._wait_for_signals = start_writer, wait_for_folders
Writer._set_signals = tell_that_it_wrote
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for failures, victim in enumerate((1, 0), start=1):
    holds = process > victim
    if process == victim:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
    checkpoints.save(4, state_items(state), {"step": 4})
    holds = False
    assert checkpoints.steps() == [2, 3] and checkpoints.failed_saves == failures
    why = "File too large" if process == victim else f"process {victim} of 2 could not"
    assert "checkpoint 4 could not be saved" in reports[-1] and why in reports[-1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
checkpoints.save(4, state_items(state), {"step": 4})
assert checkpoints.steps()[-1] == 4, reports

# Each process fails at a part that the other one writes.
part = ("params", "optimizer")[process]
write = ocp.handlers.PyTreeHandler._background_save

async def write_or_fail(self, directory, **given):
    if directory.path.name == part:
        raise OSError(f"no {part}")
    await write(self, directory, **given)

ocp.handlers.PyTreeHandler._background_save = write_or_fail
checkpoints.save(5, state_items(state), {"step": 5})
assert checkpoints.steps()[-1] == 4 and "checkpoint 5 could" in reports[-1], reports
ocp.handlers.PyTreeHandler._background_save = write
checkpoints.save(5, state_items(state), {"step": 5})
step, restored, meta = checkpoints.restore(state_items(state))
restored = state_of(restored)
assert (step, meta, checkpoints.steps()) == (5, {"step": 5}, [3, 4, 5]), reports
assert checkpoints.restore(state_items(state), step="best")[0] == 3
print(params_sha256(restored.params))
"""


def test_two_processes_agree_on_damage_and_on_saves_that_fail_on_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [child(TWO_PROCESSES, tmp_path, port, i) for i in (0, 1)]
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.enter_context(process)
            stack.callback(process.kill)
        # At once: one that nobody reads from would stop.
        pool = stack.enter_context(ThreadPoolExecutor())
        results = list(pool.map(lambda one: one.communicate(timeout=600), processes))
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors[-3000:]
    digests = [line for out, _ in results for line in out.split() if len(line) == 64]
    assert len(digests) == 6 and len(set(digests)) == 1
