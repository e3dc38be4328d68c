"""What a compiled program computes and sends, counted from its text.

Bodies of loops count as often as they run, and each branch of a condition once.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

from grpo_jax.planning._program_text import COLLECTIVES, Instruction, Laid, Program


@dataclasses.dataclass(frozen=True)
class Sent:
    """Collective operations of a kind on arrays of a dtype, counted on one device.

    Attributes:
      kind: as XLA writes it.
      dtype: as XLA writes it.
      count: how many there are.
      bytes: what the device receives at least, whatever the algorithm.
      largest: the largest array that one of them makes.
    """

    kind: str
    dtype: str
    count: int
    bytes: int
    largest: str


def executions(program: Program) -> Counter[str]:
    """How often each computation of a program runs."""
    times: Counter[str] = Counter()

    def run(name: str, often: int) -> None:
        times[name] += often
        for one in program.computations.get(name, {}).values():
            if one.opcode.endswith(("-done", "-update")):
                continue
            trips = program.trips(name, one) if one.opcode == "while" else 1
            for called in one.called:
                run(called, often * trips)

    run(program.entry, 1)
    return times


def products(program: Program) -> float:
    """Floating-point operations of the matrix products that one device computes."""
    return sum(
        often * _operations(program, name, one)
        for name, one, often in _all(program)
        if one.opcode in ("dot", "convolution", "custom-call")
    )


def sent(program: Program) -> list[Sent]:
    """The collective operations by kind and dtype, those that send most first."""
    found: dict[tuple[str, str], Sent] = {}
    most: Counter[tuple[str, str]] = Counter()
    for name, one, often in _all(program):
        kind = one.opcode.removesuffix("-start")
        # As the compiler for TPUs writes it: a sum of which a slice is taken at once.
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        if kind not in COLLECTIVES or program.goes_on(name, one):
            continue
        given = [x for operand in one.operands for x in program.laid_of(name, operand)]
        members = _members(one)
        for laid in given:
            key = kind, laid.dtype
            before = found.get(key, Sent(*key, 0, 0, ""))
            shape, size = _made(kind, laid, members)
            largest = shape if size >= most[key] else before.largest
            most[key] = max(most[key], size)
            received = _received(kind, laid, members)
            found[key] = dataclasses.replace(
                before,
                count=before.count + often * (laid is given[0]),
                bytes=before.bytes + often * received,
                largest=largest,
            )
    return sorted(found.values(), key=lambda one: -one.bytes)


def _all(program: Program) -> Iterator[tuple[str, Instruction, int]]:
    """Instructions with their computation, and how often they run."""
    for name, often in executions(program).items():
        for one in program.computations.get(name, {}).values():
            yield name, one, often


def _bytes(laid: Laid) -> int:
    return math.prod(laid.shape) * laid.item


def _received(kind: str, laid: Laid, members: int) -> int:
    """Bytes that a device receives at least, from the array that it gives."""
    size = _bytes(laid)
    match kind:
        case "all-gather":
            return size * (members - 1)
        case "all-reduce":
            return 2 * size * (members - 1) // members
        case "reduce-scatter" | "all-to-all":
            return size * (members - 1) // members
    return size


def _made(kind: str, laid: Laid, members: int) -> tuple[str, int]:
    """The array that a device gives, as text, and the bytes of what is made of it."""
    text = f"{laid.dtype}[{','.join(map(str, laid.shape))}]"
    if kind == "all-gather":
        return f"{members} x {text}", _bytes(laid) * members
    return text, _bytes(laid)


def _members(one: Instruction) -> int:
    """How many devices take part in one group of a collective operation.

    Groups are written as lists, as the shape of all of them, or by axes of a mesh.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", one.rest):
        return listed[1].count(",") + 1
    if shaped := re.search(r"replica_groups=\[\d+,(\d+)\]", one.rest):
        return int(shaped[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", one.rest):
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", named[2]))
    return 2  # of a permutation, each sends to one


def _operations(program: Program, inside: str, one: Instruction) -> float:
    """A multiplication and an addition for each product of two numbers."""
    if len(one.operands) < 2:
        return 0.0
    given = [program.laid_of(inside, name) for name in one.operands[:2]]
    if not all(given):
        return 0.0
    (left, *_), (right, *_) = given
    made = math.prod(one.result[0].shape)
    if one.opcode == "convolution":
        return 2.0 * _window(one, left, right)
    # As text of a dot, and in the settings of a library's product.
    found = re.search(
        r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)[\]}]', one.rest
    )
    if found is None:
        return 0.0
    axes = [int(n) for n in re.findall(r"\d+", found[1])]
    return 2.0 * made * math.prod(left.shape[axis] for axis in axes)


def _window(one: Instruction, left: Laid, right: Laid) -> float:
    """Products of a convolution; XLA writes batches of products as windows."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    if labels is None:
        return 0.0
    inputs, kernel, output = labels.groups()
    made = one.result[0].shape
    total = float(made[output.index("b")] * made[output.index("f")])
    total *= right.shape[kernel.index("i")]
    for axis in (label for label in output if label.isdigit()):
        total *= _pairs(
            left.shape[inputs.index(axis)],
            right.shape[kernel.index(axis)],
            made[output.index(axis)],
            *_of_window(one, int(axis)),
        )
    return total


def _of_window(one: Instruction, axis: int) -> tuple[int, int, int, int]:
    """Stride, padding in front, and dilations of the input and of the kernel."""
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    values = dict(re.findall(r"(\w+)=(\S+)", window[1] if window else ""))

    def of(name: str, default: str) -> str:
        return values[name].split("x")[axis] if name in values else default

    padding = int(of("pad", "0_0").split("_")[0])
    dilations = int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))
    return int(of("stride", "1")), padding, *dilations


@functools.cache
def _pairs(
    size: int,
    window: int,
    made: int,
    stride: int,
    padding: int,
    dilation: int,
    apart: int,
) -> int:
    """Pairs of an output and an entry of the window that meet an input, of one axis."""
    last = (size - 1) * dilation
    pairs = 0
    for entry in range(window):
        shift = entry * apart - padding
        for at in range(made):
            where = at * stride + shift
            pairs += 0 <= where <= last and where % dilation == 0
    return pairs
