"""The mesh, what it refuses by name, and the way of arrays onto it and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.config import MeshConfig
from grpo_jax.models.decoder import abstract_params, param_axes
from grpo_jax.parallel import mesh as meshes


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((2, 2, -1), (2, 2, 2)),
        ((8, -1, 1), (8, 1, 1)),
        ((2, 4, 1), (2, 4, 1)),
    ],
)
def test_one_axis_takes_the_devices_that_are_left(sizes, expected):
    data, fsdp, tensor = sizes
    mesh = meshes.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    assert tuple(mesh.shape.values()) == expected
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert meshes.batch_shards(mesh) == expected[0] * expected[1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 1), "data 1 x fsdp 1 x tensor 1 does not fit 8 devices"),
        ((3, -1, 1), "data 3 x fsdp -1 x tensor 1 does not fit 8 devices"),
        ((4, 4, 1), "data 4 x fsdp 4 x tensor 1 does not fit 8 devices"),
        ((16, -1, 1), "does not fit 8 devices; use data 1, fsdp -1, tensor 1"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes, message):
    data, fsdp, tensor = sizes
    with pytest.raises(ValueError, match=message):
        meshes.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def test_parameters_lie_where_their_axes_say(tiny_policy, meshes_of):
    model = tiny_policy.model
    axes, shapes = param_axes(model), abstract_params(model)
    shardings = meshes.parameter_shardings(axes, shapes, meshes_of(2, 2, 2))
    layers = shardings["layers"]
    assert shardings["embed"]["embedding"].spec == P("tensor", "fsdp")
    assert layers["attn"]["q"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert layers["attn"]["o"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert layers["mlp"]["down"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert layers["attn_norm"]["scale"].spec in (P(), P(None, None))
    placed = jax.device_put(tiny_policy.params, shardings)
    kernel = placed["layers"]["mlp"]["gate"]["kernel"]
    # Two layers of [32, 48], split in two by fsdp and in two by tensor.
    assert kernel.addressable_shards[0].data.shape == (2, 16, 24)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        # 10 = 2 * 5: five devices would fit, or two; the largest below eight is five.
        (
            (10, 4),
            r"embed/table \(10, 4\): 10 cannot be split over fsdp = 8 .*; 5 would",
        ),
        ((7, 4), r"7 cannot be split over fsdp = 8 devices; 7 would fit"),
        ((9, 4), r"3 would fit"),
    ],
)
def test_a_parameter_that_does_not_divide_is_named(shape, message, meshes_of):
    axes = {"embed": {"table": ("embed", None)}}
    shapes = {"embed": {"table": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    with pytest.raises(ValueError, match=message):
        meshes.parameter_shardings(axes, shapes, meshes_of(1, 8, 1))


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_rows_go_to_the_mesh_and_come_back(shape, meshes_of):
    rows = {"a": np.arange(16.0).reshape(8, 2), "b": np.arange(8, dtype=np.int32)}
    sent = meshes.to_mesh(meshes_of(*shape), rows)
    parts = shape[0] * shape[1]
    assert sent["a"].addressable_shards[0].data.shape == (8 // parts, 2)
    for way in (meshes.gather, meshes.to_host):
        back = way(sent)
        for name, values in rows.items():
            assert isinstance(back[name], np.ndarray)
            np.testing.assert_array_equal(back[name], values)
            assert back[name].dtype == sent[name].dtype


def test_rows_of_the_only_process_are_all_rows():
    rows = np.arange(6).reshape(3, 2)
    assert meshes.gather_rows(rows) is rows


def check_batch(mesh, prompts, microbatch=None, mode="jit"):
    meshes.check_batch(
        mesh, prompts, group_size=4, microbatch_size=microbatch, mode=mode
    )


@pytest.mark.parametrize(
    ("prompts", "fits"), [(9, 8), (4, 8), (13, 16), (30, 32), (1, 8)]
)
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(
    prompts, fits, meshes_of
):
    with pytest.raises(
        ValueError, match=f"{prompts} prompts .* = 8 devices; use {fits}"
    ):
        check_batch(meshes_of(2, 4, 1), prompts)


# 24 prompts on 8 devices: microbatches of 8 or 24 prompts, of 4 completions each.
@pytest.mark.parametrize(
    ("microbatch", "held", "fits"), [(2, 1, 32), (16, 4, 32), (48, 12, 32)]
)
def test_a_microbatch_that_would_leave_devices_idle_is_refused(
    microbatch, held, fits, meshes_of
):
    message = f"microbatch_size {microbatch}, {held} prompt.* = 8 devices; use {fits}"
    with pytest.raises(ValueError, match=message):
        check_batch(meshes_of(2, 4, 1), 24, microbatch)


def test_under_pmap_a_microbatch_must_divide_what_a_device_has(meshes_of):
    mesh = meshes_of(2, 1, 1)

    def check(microbatch):
        check_batch(mesh, 30, microbatch, "pmap")  # 15 prompts on each device

    for microbatch in (None, 2, 4, 12, 20, 60, 120):  # the last two: all 15
        check(microbatch)
    with pytest.raises(ValueError, match="24, 6 prompts, .* the 15 .* use 20"):
        check(24)


def test_a_batch_that_divides_is_accepted(meshes_of):
    check_batch(meshes_of(2, 2, 2), 12)
    check_batch(meshes_of(1, 1, 1), 7, 4)
    for microbatch in (32, 96):
        check_batch(meshes_of(2, 4, 1), 24, microbatch)


def test_an_abstract_mesh_is_that_of_devices_which_need_not_exist():
    mesh = meshes.abstract_mesh(MeshConfig(data=4, tensor=8), 512)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 16, "tensor": 8}
    sharding = NamedSharding(mesh, P("tensor", "fsdp"))
    assert sharding.shard_shape((64, 64)) == (8, 4)
    with pytest.raises(ValueError, match="does not fit 12 devices"):
        meshes.abstract_mesh(MeshConfig(data=8), 12)


@pytest.mark.parametrize("dtype", ["float64", "int64", "float32", "int8", "bool"])
@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_rows_of_other_processes_arrive_to_the_last_bit(dtype, shape, monkeypatch):
    rng = np.random.default_rng(0)
    rows = {"a": (rng.normal(size=shape) * 1e9).astype(dtype)}

    def allgather(values, tiled):
        """Of two processes with the same rows, which JAX rounds on the way."""
        return jax.tree.map(lambda x: np.concatenate([jnp.asarray(x)] * 2), values)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(meshes.multihost_utils, "process_allgather", allgather)
    gathered = meshes.gather_rows(rows)["a"]
    assert gathered.dtype == dtype
    np.testing.assert_array_equal(gathered, np.concatenate([rows["a"]] * 2))


@pytest.mark.parametrize("count", [0, 1, 5, 8])
@pytest.mark.parametrize("processes", [1, 3, 8])
def test_shares_are_even_and_together_everything(count, processes, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    shares = []
    for number in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        shares.append(list(range(count))[meshes.own_share(count)])
    assert sum(shares, []) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
