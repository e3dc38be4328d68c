"""Checkpoints come back bit for bit, or a step that does; nothing is lost silently."""

import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from grpo_jax.checkpointing._metadata import metadata_sha256
from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.config import CheckpointConfig, MeshConfig
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.mesh import named_leaves
from grpo_jax.training.state import TrainState, make_train_state, state_items, state_of

sys.path.insert(0, str(Path(__file__).parent))

from damages import (  # noqa: E402
    DAMAGES,
    HARMLESS,
    change_json,
    data_file,
    flip,
    truncate,
)

# Reads that Orbax has under way when another one fails end in a closed event loop.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

TX = optax.adamw(1e-2)
SPECS = {"embed": P("tensor", "fsdp"), "mlp": {"kernel": P("fsdp", "tensor")}}


def make_params(seed: int = 0, *, rows: int = 64) -> dict:
    one, two = jax.random.split(jax.random.key(seed))
    return {
        "embed": jax.random.normal(one, (rows, 32)),
        "mlp": {
            "kernel": jax.random.normal(two, (32, rows)),
            "scale": jnp.arange(16, dtype=jnp.bfloat16),
        },
        "on": jnp.array([True, False]),
        "ids": jnp.arange(5, dtype=jnp.uint32),
    }


@jax.jit
def train_step(state: TrainState) -> TrainState:
    grads = jax.tree.map(
        lambda p: jnp.sin(p) if jnp.issubdtype(p.dtype, jnp.floating) else p * 0,
        trained(state.params),
    )
    updates, opt_state = TX.update(grads, state.opt_state, trained(state.params))
    params = state.params | optax.apply_updates(trained(state.params), updates)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state)


def trained(params: dict) -> dict:
    return {name: params[name] for name in ("embed", "mlp")}


def make_state(seed: int = 0, *, updates: int = 2, rows: int = 64) -> TrainState:
    params = make_params(seed, rows=rows)
    state = TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=TX.init(trained(params))
    )
    for _ in range(updates):
        state = train_step(state)
    return state


def spread(state: TrainState, data: int, fsdp: int, tensor: int) -> TrainState:
    """The state on a mesh of the first devices; moments lie as their parameters do."""
    mesh = meshes.make_mesh(
        MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
        devices=jax.devices()[: data * fsdp * tensor],
    )

    def place(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = P()
        if name.endswith("embed"):
            spec = SPECS["embed"]
        elif name.endswith("mlp/kernel"):
            spec = SPECS["mlp"]["kernel"]
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, state)


def assert_same_bits(one, two) -> None:
    one, two = named_leaves(one), named_leaves(two)
    assert one.keys() == two.keys()
    for name, leaf in one.items():
        assert leaf.dtype == two[name].dtype, name
        assert np.asarray(leaf).tobytes() == np.asarray(two[name]).tobytes(), name


def open_checkpoints(path: Path, **config) -> tuple[Checkpoints, list[str]]:
    reports: list[str] = []
    return Checkpoints(path, CheckpointConfig(**config), report=reports.append), reports


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory) -> tuple[Path, dict[int, TrainState]]:
    """A folder with steps 10, 20 and 30."""
    path = tmp_path_factory.mktemp("checkpoints")
    states = {step: make_state(step) for step in (10, 20, 30)}
    checkpoints, _ = open_checkpoints(path)
    for step, state in states.items():
        checkpoints.save(step, state_items(state), {"position": step, "name": "x"})
    checkpoints.close()
    return path, states


@pytest.fixture
def copy(three_steps, tmp_path) -> tuple[Path, dict[int, TrainState]]:
    shutil.copytree(three_steps[0], tmp_path / "copy")
    return tmp_path / "copy", three_steps[1]


# Values


def test_a_state_comes_back_bit_for_bit_on_any_mesh(tmp_path):
    state = make_state()
    checkpoints, reports = open_checkpoints(tmp_path)
    layouts = [(1, 4, 2), (1, 2, 2), (2, 2, 2), (1, 1, 1), (1, 8, 1)]
    current = spread(state, 1, 8, 1)
    for step, layout in enumerate(layouts):
        checkpoints.save(step, state_items(current), {"layout": layout})
        like = spread(jax.tree.map(jnp.zeros_like, state), *layout)
        found, current, meta = checkpoints.restore(state_items(like))
        current = state_of(current)
        assert (found, meta) == (step, {"layout": list(layout)})
        assert_same_bits(current, state)
        for leaf, wanted in zip(
            jax.tree.leaves(current), jax.tree.leaves(like), strict=True
        ):
            assert leaf.sharding == wanted.sharding
    # Moments lie as their parameters do, on the last mesh too.
    mu = current.opt_state[0].mu
    assert mu["embed"].sharding == current.params["embed"].sharding
    assert reports == []


@pytest.mark.parametrize("where", ["no mesh", "mesh", "mesh, scalars on one device"])
def test_training_goes_on_as_if_nothing_had_happened(tmp_path, where):
    state = make_state()
    if where != "no mesh":
        state = spread(state, 1, 4, 2)
    checkpoints, _ = open_checkpoints(tmp_path)
    checkpoints.save(2, state_items(state), {})
    like = state
    if where == "mesh, scalars on one device":
        # As `tx.init` leaves the count: on the default device, beside a mesh.
        like = jax.tree.map(
            lambda leaf: jnp.zeros((), leaf.dtype) if leaf.ndim == 0 else leaf,
            like,
        )
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding
            ),
            like,
        )
    _, restored, _ = checkpoints.restore(state_items(like))
    restored = state_of(restored)
    assert_same_bits(train_step(train_step(restored)), train_step(train_step(state)))


def test_a_state_made_from_scratch_is_a_good_target(tmp_path):
    # The loop restores into what `make_train_state` returns: a count without a mesh.
    mesh = meshes.make_mesh(MeshConfig(fsdp=8))
    params = jax.device_put({"w": jnp.ones((8, 4))}, NamedSharding(mesh, P("fsdp")))
    state = make_train_state(params, TX)
    checkpoints, _ = open_checkpoints(tmp_path)
    checkpoints.save(1, state_items(state), {})
    _, restored, _ = checkpoints.restore(state_items(state))
    restored = state_of(restored)

    @jax.jit
    def step(state):
        _, opt_state = TX.update(state.params, state.opt_state, state.params)
        return opt_state

    assert_same_bits(step(restored), step(state))


def test_without_a_mesh_arrays_stay_free_to_join_any(tmp_path):
    state = make_state()
    checkpoints, _ = open_checkpoints(tmp_path)
    checkpoints.save(1, state_items(state), {})
    _, restored, _ = checkpoints.restore(state_items(state))
    restored = state_of(restored)
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored))
    _, params, _ = checkpoints.restore_params(like=jax.eval_shape(make_params))
    assert_same_bits(params, state.params)


def test_a_state_may_be_donated_once_save_returns(tmp_path):
    overwrite = jax.jit(
        lambda state: jax.tree.map(jnp.zeros_like, state), donate_argnums=0
    )
    checkpoints, _ = open_checkpoints(tmp_path)
    big = {"w": jnp.arange(1 << 22, dtype=jnp.float32)}
    for step in range(3):
        state = make_train_state(jax.tree.map(lambda x: x + 0, big), TX)
        checkpoints.save(step, state_items(state), {})
        state = overwrite(state)
        jax.block_until_ready(state)
        _, restored, _ = checkpoints.restore(state_items(state))
        restored = state_of(restored)
        np.testing.assert_array_equal(restored.params["w"], big["w"])


def test_parameters_alone_need_neither_devices_nor_a_target(tmp_path):
    state = spread(make_state(), 2, 2, 2)
    checkpoints, _ = open_checkpoints(tmp_path)
    checkpoints.save(7, state_items(state), {"epoch": 1}, wait=True)
    shutil.rmtree(tmp_path / "7" / "optimizer")
    step, params, meta = checkpoints.restore_params()
    assert (step, meta) == (7, {"epoch": 1})
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert_same_bits(params, state.params)


def test_the_layout_is_plain_orbax(three_steps):
    path, states = three_steps
    meta = ocp.load_checkpointables(path / "10", {"meta": None})["meta"]
    assert meta["schema"] == 1
    assert meta["run"] == {"position": 10, "name": "x"}
    assert meta["arrays"]["params/mlp/kernel"]["shape"] == [32, 64]
    assert meta["arrays"]["optimizer/opt_state/0/count"]["dtype"] == "int32"
    like = {"params": states[10].params}
    assert_same_bits(ocp.load_checkpointables(path / "10", like), like)


# Which steps there are


def test_the_newest_steps_and_every_nth_are_kept(tmp_path):
    state = make_state(updates=0)
    checkpoints, _ = open_checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 11):
        checkpoints.save(step, state_items(state), {})
    checkpoints.close()
    assert checkpoints.steps() == [4, 8, 9, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "4", "8", "9"]


def test_a_step_can_be_asked_for_and_must_exist(three_steps):
    path, states = three_steps
    checkpoints, _ = open_checkpoints(path)
    step, state, meta = checkpoints.restore(state_items(states[30]), step=20)
    state = state_of(state)
    assert (step, meta["position"]) == (20, 20)
    assert_same_bits(state, states[20])
    with pytest.raises(ValueError, match=r"no checkpoint 25 .*\[10, 20, 30\]"):
        checkpoints.restore(state_items(states[30]), step=25)


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    checkpoints, _ = open_checkpoints(tmp_path / "new")
    assert checkpoints.restore(state_items(make_state())) is None
    assert checkpoints.steps() == []
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoints.restore_params()


def test_a_step_that_exists_is_replaced(tmp_path):
    checkpoints, _ = open_checkpoints(tmp_path)
    checkpoints.save(5, state_items(make_state(1)), {})
    checkpoints.save(5, state_items(make_state(2)), {})
    _, restored, _ = checkpoints.restore(state_items(make_state(0)))
    restored = state_of(restored)
    assert_same_bits(restored, make_state(2))


# Damage


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_gives_way_to_the_one_before(copy, damage):
    path, states = copy
    DAMAGES[damage](path / "30")
    checkpoints, reports = open_checkpoints(path)
    step, state, meta = checkpoints.restore(state_items(states[30]))
    state = state_of(state)
    assert (step, meta["position"]) == (20, 20)
    assert_same_bits(state, states[20])
    assert checkpoints.steps() == [10, 20]
    assert (path / "30.damaged").is_dir()
    (report,) = reports
    assert "30" in report and "step 20" in report


@pytest.mark.parametrize("loss", HARMLESS)
def test_files_that_hold_no_values_may_be_lost(copy, loss):
    path, states = copy
    HARMLESS[loss](path / "30")
    checkpoints, reports = open_checkpoints(path)
    step, state, _ = checkpoints.restore(state_items(states[30]))
    state = state_of(state)
    assert step == 30
    assert_same_bits(state, states[30])
    assert reports == []


def test_two_damaged_steps_are_both_quarantined_and_can_be_saved_again(copy):
    path, states = copy
    flip(data_file(path / "30"))
    truncate(path / "20" / "meta" / "data.json")
    (path / "30.damaged").mkdir()
    checkpoints, reports = open_checkpoints(path)
    assert checkpoints.restore(state_items(states[30]))[0] == 10
    assert len(reports) == 2
    assert (path / "30.damaged-2").is_dir() and (path / "20.damaged").is_dir()
    # Steps that Orbax has seen before must not be dropped.
    for step in (20, 30):
        checkpoints.save(step, state_items(states[step]), {"again": step})
    step, state, meta = checkpoints.restore(state_items(states[10]))
    state = state_of(state)
    assert (step, meta) == (30, {"again": 30})
    assert_same_bits(state, states[30])


def test_if_all_steps_are_damaged_none_is_touched_and_the_run_stops(copy):
    path, states = copy
    for step in (10, 20, 30):
        flip(data_file(path / str(step)))
    checkpoints, reports = open_checkpoints(path)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"no good checkpoint.*30 is damaged \(changed"
        ):
            checkpoints.restore(state_items(states[30]))
    assert checkpoints.steps() == [10, 20, 30]
    assert reports == []


def test_a_damaged_step_that_was_asked_for_is_an_error(copy):
    path, states = copy
    flip(data_file(path / "20"))
    checkpoints, _ = open_checkpoints(path)
    with pytest.raises(ValueError, match=r"20 is damaged \(changed.*\[10, 30\]"):
        checkpoints.restore(state_items(states[30]), step=20)
    with pytest.raises(ValueError, match="params/embed|params/mlp"):
        checkpoints.restore_params(20)
    assert checkpoints.steps() == [10, 20, 30]


# What is not damage


def test_another_shape_dtype_or_tree_is_an_error_that_touches_nothing(three_steps):
    path, states = three_steps
    checkpoints, reports = open_checkpoints(path)
    params = states[30].params
    with pytest.raises(ValueError, match=r"params/embed: float32 \(64, 32\) in the"):
        checkpoints.restore(state_items(make_state(rows=8, updates=0)))
    with pytest.raises(ValueError, match="params/on: bool .* here"):
        checkpoints.restore_params(like=params | {"on": params["embed"]})
    with pytest.raises(ValueError, match="params/ids: uint32 .*absent here"):
        checkpoints.restore_params(like={k: params[k] for k in params if k != "ids"})
    with pytest.raises(ValueError, match="params/extra: absent in the checkpoint"):
        checkpoints.restore_params(like=params | {"extra": params["on"]})
    with pytest.raises(ValueError, match="optimizer/opt_state"):
        checkpoints.restore(
            state_items(states[30].replace(opt_state=optax.sgd(1).init(params)))
        )
    assert checkpoints.steps() == [10, 20, 30] and reports == []


def test_a_mesh_that_does_not_divide_an_array_is_an_error(three_steps):
    path, states = three_steps
    mesh = meshes.make_mesh(MeshConfig(fsdp=8))
    like = states[30].params | {
        "ids": jax.ShapeDtypeStruct(
            (5,), jnp.uint32, sharding=NamedSharding(mesh, P("fsdp"))
        )
    }
    checkpoints, _ = open_checkpoints(path)
    with pytest.raises(ValueError, match="params/ids does not fit its mesh"):
        checkpoints.restore_params(like=like)
    assert checkpoints.steps() == [10, 20, 30]


def test_a_newer_schema_is_refused_not_damaged(copy):
    path, states = copy

    def renew(meta):
        meta["schema"] = 2
        meta["sha256"] = metadata_sha256(meta)

    change_json(path / "30" / "meta" / "data.json", renew)
    checkpoints, _ = open_checkpoints(path)
    with pytest.raises(ValueError, match="30 has schema 2.*reads schema 1"):
        checkpoints.restore(state_items(states[30]))
    assert checkpoints.steps() == [10, 20, 30]


def failing(error):
    def fail(*_):
        raise KeyError("wrapped, as Orbax does") from error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("full"),
        PermissionError("no"),
        ValueError("RESOURCE_EXHAUSTED: no memory"),
        RuntimeError("device lost"),
    ],
)
def test_an_error_of_the_machine_is_raised_as_it_is(copy, monkeypatch, error):
    path, states = copy
    checkpoints, reports = open_checkpoints(path)
    monkeypatch.setattr(ocp, "load_checkpointables", failing(error))
    with pytest.raises(KeyError, match="wrapped") as raised:
        checkpoints.restore(state_items(states[30]))
    assert raised.value.__cause__ is error
    assert checkpoints.steps() == [10, 20, 30] and reports == []


def test_a_bug_sets_nothing_aside_and_shows_where_it_is(copy, monkeypatch):
    path, states = copy
    checkpoints, reports = open_checkpoints(path)
    bug = failing(TypeError("bug"))
    monkeypatch.setattr(ocp, "load_checkpointables", bug)
    with pytest.raises(ValueError, match=r"30 is damaged \(TypeError: bug") as raised:
        checkpoints.restore(state_items(states[30]))
    assert "in fail" in raised.value.__cause__.__notes__[0]
    assert checkpoints.steps() == [10, 20, 30] and reports == []
