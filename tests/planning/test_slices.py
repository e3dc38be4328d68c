"""Targets of compilation: their names, and what is said where there is no compiler."""

import platform
import sys

import jax
import pytest

from grpo_jax.planning import slices
from grpo_jax.planning.slices import Target, devices_of, find_target


@pytest.mark.parametrize(
    ("name", "device", "count"),
    [
        ("v5e:2x4", "v5e", 8),
        ("v6e:4x4", "v6e", 16),
        ("v5p:2x2x1", "v5p", 4),
        ("v5e:1x1", "v5e", 1),
        ("cpu", None, None),
        ("gpu", None, None),
    ],
)
def test_a_slice_has_the_chips_of_its_name(name, device, count):
    target = find_target(name)
    assert (target.device, target.count) == (device, count)


@pytest.mark.parametrize(
    "name", ["v5e", "v5e-8", "v5p:2x4", "v6e:2x2x2", "v5e:0x4", "tpu", "v4:2x2x1", ""]
)
def test_what_is_no_slice_is_refused_with_names_of_some(name):
    with pytest.raises(ValueError, match=r"v5e:2x4, v6e:4x4 or v5p:2x2x1") as error:
        find_target(name)
    assert f"--compile {name} " in str(error.value)


def test_the_cpu_gives_as_many_devices_as_there_are():
    there = len(jax.devices("cpu"))  # JAX has started, so their number stays
    with devices_of(find_target("cpu"), 3) as find:
        assert find(2) == jax.devices("cpu")[:2]
        with pytest.raises(ValueError, match=f"{there + 1} devices, and here are"):
            find(there + 1)


def test_a_gpu_that_is_not_here_is_told():
    with devices_of(Target("gpu")) as find:
        with pytest.raises(ValueError, match="finds no such device here"):
            find(1)


def enter(name):
    with devices_of(find_target(name)):
        raise AssertionError("nothing can be compiled here")


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu.so"))
    cached = jax.config.jax_enable_compilation_cache
    with pytest.raises(ValueError, match=r"libtpu\.so; install grpo-jax\[tpu\], or"):
        enter("v5e:2x4")
    assert jax.config.jax_enable_compilation_cache == cached


@pytest.mark.parametrize(
    ("system", "machine"),
    [("darwin", "arm64"), ("linux", "aarch64"), ("win32", "AMD64")],
)
def test_where_there_is_no_libtpu_the_error_names_the_machine(
    monkeypatch, system, machine
):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(ValueError, match=f"x86_64, and this is .* on {machine}"):
        enter("v6e:2x4")


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (["numpy>=1", 'libtpu==0.0.42.*; extra == "tpu"'], "libtpu==0.0.42.*"),
        (["libtpu-nightly==1.0", "libtpu-x", "libtpu >=2"], "libtpu >=2"),
        (None, "libtpu"),
    ],
)
def test_libtpu_is_the_one_that_jax_asks_for(monkeypatch, lines, wanted):
    monkeypatch.setattr(slices, "requires", lambda name: lines)
    assert slices.wanted_library() == wanted
