"""How a process finds the others of its run, or that it is alone."""

import os

import jax
import pytest

from grpo_jax.config import MeshConfig
from grpo_jax.parallel.processes import initialize_processes


@pytest.fixture
def started(monkeypatch):
    """What `jax.distributed` was asked to do, with no setting around."""
    for name in list(os.environ):
        if name.startswith(("GRPO_", "SLURM_", "OMPI_", "JOB_", "KUBERNETES_")):
            monkeypatch.delenv(name)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: calls.append(a))
    return calls


@pytest.mark.parametrize(
    ("config", "environment", "missing"),
    [
        ({"coordinator": "h:1"}, {}, "mesh.num_processes, mesh.process_id"),
        ({"num_processes": 2}, {}, "mesh.coordinator, mesh.process_id"),
        ({"coordinator": "h:1", "num_processes": 2}, {}, "mesh.process_id"),
        ({"num_processes": 2}, {"GRPO_COORDINATOR": "h:1"}, "mesh.process_id"),
        ({}, {"GRPO_PROCESS_ID": "0"}, "mesh.coordinator, mesh.num_processes"),
    ],
)
def test_some_of_the_process_settings_are_refused(
    config, environment, missing, started, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{missing} must be given too"):
        initialize_processes(MeshConfig(**config))
    assert not started


def test_processes_join_by_configuration_or_environment(started, monkeypatch):
    config = MeshConfig(coordinator="h:1", num_processes=4, process_id=0)
    initialize_processes(config)
    monkeypatch.setenv("GRPO_COORDINATOR", "g:2")
    monkeypatch.setenv("GRPO_NUM_PROCESSES", "2")
    monkeypatch.setenv("GRPO_PROCESS_ID", "1")
    initialize_processes(MeshConfig())
    # What the configuration says goes before the environment.
    initialize_processes(MeshConfig(process_id=0))
    assert started == [("h:1", 4, 0), ("g:2", 2, 1), ("g:2", 2, 0)]


def test_a_setting_that_is_no_number_is_named(started, monkeypatch):
    monkeypatch.setenv("GRPO_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="GRPO_NUM_PROCESSES must be a number, got 't"):
        initialize_processes(MeshConfig())


def test_a_process_alone_starts_nothing(started, monkeypatch):
    # Asking how many there are starts the backend; its settings could not change then.
    monkeypatch.setattr(jax, "process_count", lambda: pytest.fail("a backend started"))
    initialize_processes(MeshConfig())
    assert not started


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"JOB_COMPLETION_INDEX": "0", "KUBERNETES_SERVICE_HOST": "x"},
    ],
)
def test_in_a_cluster_jax_finds_the_processes(environment, started, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    initialize_processes(MeshConfig())
    assert started == [()]


def test_a_runtime_that_runs_is_left_alone(started, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    initialize_processes(MeshConfig(coordinator="h:1"))
    assert not started


@pytest.mark.parametrize(
    ("processes", "platform", "used"),
    [(1, "cpu", True), (2, "cpu", False), (2, "tpu", True)],
)
def test_several_processes_on_cpus_load_no_stored_programs(
    processes, platform, used, started, monkeypatch
):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: processes > 1)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    try:
        initialize_processes(MeshConfig())
        assert jax.config.jax_enable_compilation_cache is used
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
