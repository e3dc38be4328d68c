"""Devices by their names, and how many a slice has by its type."""

import pathlib
import re

import pytest

from grpo_jax.planning import devices
from grpo_jax.planning.devices import DEVICES, find_device, known_flops

SLICES = {  # type: chips, and what each is, by the pages of Google's documentation
    "v4-8": (4, "v4"),
    "v5litepod-8": (8, "v5e"),
    "v5e-8": (8, "v5e"),
    "v5p-16": (8, "v5p"),
    "v5p-12288": (6144, "v5p"),
    "v6e-8": (8, "v6e"),
}


@pytest.mark.parametrize("name", SLICES)
def test_the_type_of_a_slice_is_so_many_devices(name):
    count, device = SLICES[name]
    assert find_device(name) == (DEVICES[device], count)


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_is_not_a_number_of_them(name):
    assert find_device(name) == (DEVICES[name], None)


@pytest.mark.parametrize(
    "name", ["", "v99", "v99-8", "h100-8", "v5p-", "v5p-0", "v5p-08", "v5p-8-8", "V5P"]
)
def test_other_names_are_refused_with_those_that_are_known(name):
    with pytest.raises(ValueError, match=f"'{name}' is not known; use one of v4, v5e"):
        find_device(name)


@pytest.mark.parametrize("name", ["v4-7", "v5p-7"])
def test_there_is_no_half_of_a_device(name):
    with pytest.raises(ValueError, match="counts cores, 2 to a device"):
        find_device(name)


def test_the_page_has_the_devices_of_every_type():
    page = (pathlib.Path(__file__).parents[2] / "tpu_setup/README.md").read_text()
    table = page.partition("### Types")[2].partition("`--runtime`")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    column = rows[0].index("devices")
    told = {
        name: int(row[column])
        for row in rows
        for name in re.findall(r"`([a-z0-9]+-\d+)`", row[0])
    }
    assert told.keys() >= {"v4-8", "v5litepod-8", "v5e-8", "v5p-8", "v6e-8"}
    assert told == {name: find_device(name)[1] for name in told}


def test_a_peak_is_known_for_the_names_that_jax_gives_devices():
    assert known_flops("TPU v5p") == DEVICES["v5p"].flops
    assert known_flops("cpu") is None


@pytest.mark.parametrize(
    ("version", "flags", "expected"),
    [
        ((0, 11, 0), "avx512f amx_bf16 amx_tile", True),
        ((0, 10, 2), "avx512f amx_bf16 amx_tile", False),
        ((0, 12, 0), "avx512f avx512_bf16", True),
        ((0, 10, 2), "avx512f avx512_bf16", False),
        ((0, 12, 0), "avx512f avx512_vnni", False),
        ((0, 12, 0), None, False),
    ],
)
def test_instructions_for_bfloat16_count_where_jax_uses_them(
    version, flags, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(devices.jax, "__version_info__", version)
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"model name\t: some\nflags\t\t: fpu {flags}\n")
    assert devices.has_bfloat16_products(cpuinfo) == expected
