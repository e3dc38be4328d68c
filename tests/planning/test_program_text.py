"""What is counted in the text of a program: loops, products, what is sent and moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.planning._counts import products, sent
from grpo_jax.planning._program_text import Program

# As a compiler for TPUs writes it: no trip count, a counter that goes in steps of two,
# a batch of products as a convolution, groups by the axes of a mesh, tiles.
TPU = """\
HloModule jit_f

%condition (p.1: (u32[], bf16[8,128])) -> pred[] {
  %p.1 = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = u32[]{:T(128)} constant(8)
  %at = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%body (p.2: (u32[], bf16[8,128])) -> (u32[], bf16[8,128]) {
  %p.2 = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p.2), index=0
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p.2), index=1
  %moved = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,0}}
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} collective-permute-done(%moved)
  ROOT %both = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%next, %y)
}

ENTRY %main (a: bf16[8,128], q: f32[2,16,4], k: f32[2,32,4]) -> f32[2,16,32] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = f32[2,16,4]{2,1,0:T(8,128)} parameter(1)
  %k = f32[2,32,4]{2,1,0:T(8,128)} parameter(2)
  %zero = u32[]{:T(128)} constant(0)
  %start = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%zero, %a)
  %loop = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%start), \
condition=%condition, body=%body
  %whole = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%a), \
replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}, dimensions={0}
  ROOT %scores = f32[2,16,32]{2,1,0:T(8,128)} convolution(%q, %k), \
window={size=2 stride=1 lhs_dilate=2}, dim_labels=0bf_0oi->0bf
}
"""


# A gather that is cut into steps, of which the second also has a product.
CHAIN = """\
HloModule jit_g

%first (p.0: bf16[16,128]) -> (bf16[16,128], bf16[64,128], u32[]) {
  %p.0 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %g.0 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, \
replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %s.0 = (bf16[16,128]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}) custom-call(%g.0), custom_call_target="AsyncCollectiveStart"
}

%second (p.1: bf16[16,128], q.1: bf16[64,128], r.1: u32[], x.1: bf16[8,128], \
y.1: bf16[128,256]) -> (bf16[8,256], bf16[16,128], bf16[64,128], bf16[64,128], u32[]) {
  %p.1 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %r.1 = u32[]{:S(2)} parameter(2)
  %x.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(3)
  %y.1 = bf16[128,256]{1,0:T(8,128)(2,1)} parameter(4)
  %g.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, \
replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  %z.1 = bf16[8,256]{1,0:T(8,128)(2,1)} convolution(%x.1, %y.1), dim_labels=bf_io->bf
  ROOT %t.1 = (bf16[8,256]{1,0:T(8,128)(2,1)}, bf16[16,128]{1,0:T(8,128)(2,1)}, \
bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
tuple(%z.1, %p.1, %q.1, %g.1, %r.1)
}

ENTRY %main (a: bf16[16,128], x: bf16[8,128], y: bf16[128,256]) -> bf16[8,256] {
  %a = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %y = bf16[128,256]{1,0:T(8,128)(2,1)} parameter(2)
  %begun = (bf16[16,128]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%first
  %s = bf16[16,128]{1,0:T(8,128)(2,1)} get-tuple-element(%begun), index=0
  %b = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%begun), index=1
  %u = u32[]{:S(2)} get-tuple-element(%begun), index=2
  %step = (bf16[8,256]{1,0:T(8,128)(2,1)}, bf16[16,128]{1,0:T(8,128)(2,1)}, \
bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
fusion(%s, %b, %u, %x, %y), kind=kOutput, calls=%second
  ROOT %z = bf16[8,256]{1,0:T(8,128)(2,1)} get-tuple-element(%step), index=0
}
"""


def test_a_gather_cut_into_steps_counts_once():
    program = Program(CHAIN)
    (gathered,) = sent(program)
    assert (gathered.count, gathered.bytes) == (1, 3 * 16 * 128 * 2)
    # A step moves the product's arrays, and no buffer of the gather.
    moved = program.traffic("main")["step"]
    assert moved == 2 * (8 * 128 + 128 * 256 + 8 * 256)


def test_a_sum_of_which_a_part_is_taken_is_a_reduce_scatter():
    text = """\
HloModule jit_h

%all-reduce-scatter.1 (p: bf16[64,128]) -> bf16[16,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  %sum = bf16[64,128]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %at = s32[] constant(0)
  ROOT %part = bf16[16,128]{1,0} dynamic-slice(%sum, %at, %at), \
dynamic_slice_sizes={16,128}
}

ENTRY %main (a: bf16[64,128]) -> bf16[16,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  ROOT %f = bf16[16,128]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (one,) = sent(Program(text))
    assert (one.kind, one.count, one.bytes) == ("reduce-scatter", 1, 3 * 16 * 128 * 2)


def test_a_program_for_a_tpu_is_counted_by_hand():
    program = Program(TPU)
    loop = program.computations["main"]["loop"]
    assert program.trips("main", loop) == 4  # from 0 to 8 in steps of two
    # Both products of the batch, 16 x 32 x 4 each: a window of two meets one of them.
    assert products(program) == 2 * 2 * 16 * 32 * 4
    gather, permute = sent(program)
    size = 8 * 128 * 2
    assert (gather.kind, gather.count, gather.bytes) == ("all-gather", 1, 7 * size)
    assert gather.largest == "8 x bf16[8,128]" and gather.dtype == "bf16"
    assert (permute.kind, permute.count) == ("collective-permute", 4)
    assert permute.bytes == 4 * size


def test_a_loop_that_ends_otherwise_runs_as_often_as_is_said():
    text = TPU.replace("direction=LT", "direction=NE")
    program = Program(text, turns=256)
    assert program.trips("main", program.computations["main"]["loop"]) == 256


def test_arrays_count_with_their_tiles():
    program = Program(TPU)
    # Eight lanes of 128 for four numbers: q and k are read so, and scores written.
    scores = program.traffic("main")["scores"]
    assert scores == 4 * (2 * 16 * 128 + 2 * 32 * 128 + 2 * 16 * 128)


def compiled(function, *arguments):
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


@pytest.mark.parametrize("trips", [1, 5])
def test_products_in_loops_count_as_often_as_they_run(trips):
    def chain(x, weights):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    shapes = jax.ShapeDtypeStruct((16, 24), "float32")
    weights = jax.ShapeDtypeStruct((trips, 24, 24), "float32")
    assert products(compiled(chain, shapes, weights)) == 2 * trips * 16 * 24 * 24


def test_what_is_sent_follows_from_the_size_of_a_group():
    devices = np.array(jax.devices()[:4]).reshape(4)
    mesh = Mesh(devices, ("x",), axis_types=(AxisType.Auto,))

    def shape(*axes):
        return jax.ShapeDtypeStruct(
            (64, 32), "float32", sharding=NamedSharding(mesh, P(*axes))
        )

    def total(x, y):  # contracted over the axis that is split
        return x.T @ y

    (one,) = sent(compiled(total, shape("x"), shape("x")))
    assert (one.kind, one.dtype, one.count) == ("all-reduce", "f32", 1)
    # Each device sends and receives its part twice: 2 (n - 1) / n of 32 x 32 numbers.
    assert one.bytes == 2 * 3 * 32 * 32 * 4 // 4
