"""Compiled programs: what a device holds, the least time, what does not compile."""

import jax
import jax.numpy as jnp

from grpo_jax.planning.compiled import measure, summarize
from grpo_jax.planning.devices import Device
from grpo_jax.training._lowered import Program


def product(others=0, times=1, phase="update", fails=False):
    shape = jax.ShapeDtypeStruct((32, 32), jnp.float32)

    def lower():
        if fails:
            raise NotImplementedError("no such product")
        return jax.jit(lambda x, y: x @ y).lower(shape, shape)

    return Program(phase, "product", lower, others, times)


def test_a_program_holds_its_arrays_and_what_lies_beside_them():
    row = measure(product(others=1000), Device("a kind", 1, 1e6, 1e9))
    one = 32 * 32 * 4
    assert (row["arguments"], row["results"]) == (2 * one, one)
    held = row["temporaries"] + row["code"] + 1000
    assert row["peak"] == 3 * one + held
    assert row["flops"] == 2 * 32**3 and row["received"] == 0


def test_the_floor_is_the_slowest_of_products_memory_and_links():
    row = measure(product(), Device("a kind", 1, 1e6, 1e12))
    assert row["floor"] == row["flops"] / 1e6
    row = measure(product(), Device("a kind", 1, 1e12, 1e3))
    assert row["floor"] == row["moved"] / 1e3
    assert measure(product(), None)["floor"] is None


def test_a_step_is_the_sum_of_its_phases_and_the_largest_counts():
    device = Device("a kind", 1, 1e6, 1e12)
    programs = [
        product(5000, times=3),
        product(9000, phase="score"),
        product(times=0, phase="evaluation"),
    ]
    rows = [measure(one, device) for one in programs]
    made = summarize(rows, {"update": rows[0]["peak"] * 2}, rows[1]["peak"])
    assert made["phases"]["update"]["ratio"] == 0.5
    assert made["phases"]["score"]["ratio"] is None
    assert made["peak"] == rows[1]["peak"] and made["fits"]
    assert made["floor"] == 4 * rows[0]["floor"]
    assert made["phases"]["evaluation"]["floor"] is None
    assert not summarize(rows, {}, rows[1]["peak"] - 1)["fits"]


def test_a_program_that_does_not_compile_is_told_and_leaves_the_outcome_open():
    rows = [measure(product(), None), measure(product(fails=True), None)]
    made = summarize(rows, {}, 2**30)
    assert made["programs"][1]["error"] == "no such product"
    assert made["fits"] is None and list(made["phases"]) == ["update"]


def test_a_program_whose_text_jax_cannot_read_is_told(monkeypatch):
    def unreadable(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    assert "RET_CHECK" in measure(product(), None)["error"]
