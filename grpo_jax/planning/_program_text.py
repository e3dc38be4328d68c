"""What a compiled program moves, counted from its text.

Bytes are those between a device's main memory and its cores. An array whose layout says
`S(1)` lies in the fast memory beside the cores; what is read there was copied there
before, and that copy is counted. Arrays count as they are laid out, tiles filled up.
Of an array that is read through a slice or a gather the slice counts, and of one that
is written by `dynamic-update-slice` the update.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$",
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Nothing moves: names for arrays that are there, or the end of what was begun.
_STILL = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "after-all",
    "partition-id",
    "replica-id",
    "optimization-barrier",
}
_STILL_CALLS = ("ConcatBitcast", "AllocateBuffer", "GlobalDecreasingSizeBestFit")
_SLICES = {"dynamic-slice", "slice", "gather"}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


@dataclass(frozen=True)
class Laid:
    """An array: its shape, and where and how it lies."""

    dtype: str
    shape: tuple[int, ...]
    item: int  # bytes of an element
    size: int  # bytes, tiles filled up
    fast: bool  # in the memory beside the cores


@dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    opcode: str
    result: tuple[Laid, ...]
    operands: tuple[str, ...]
    rest: str  # what follows the operands
    root: bool

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        names = branches[1].replace("%", "").split(", ") if branches else []
        return names + _CALLED.findall(self.rest)

    @property
    def estimated_cycles(self) -> int:
        """What the compiler for TPUs expects it to take; 0 where it does not say."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0

    @property
    def number(self) -> int:
        """Which parameter of its computation it is."""
        return int(self.operands[0])


class Program:
    """The text of a compiled program, taken apart."""

    def __init__(self, text: str, *, turns: int = 1) -> None:
        """Takes a text apart; loops of which it does not say so run `turns` times."""
        self._turns = turns
        self.entry = ""
        self.computations: dict[str, dict[str, Instruction]] = {}
        lines: dict[str, Instruction] = {}
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                lines = self.computations.setdefault(start[1], {})
                self.entry = start[1] if line.startswith("ENTRY") else self.entry
            elif found := _INSTRUCTION.match(line):
                lines[found[2]] = _instruction(found)

    def loop(self) -> str:
        """The body of the loop that runs the most of the program's text.

        Raises:
          ValueError: without a loop.
        """
        bodies = {
            re.sub(r".*body=%?([\w.\-]+).*", r"\1", one.rest)
            for lines in self.computations.values()
            for one in lines.values()
            if one.opcode == "while"
        }
        if not bodies:
            raise ValueError("the program has no loop, expected that over tokens.")
        return max(bodies, key=lambda name: len(list(self.within(name))))

    def reached(self, computation: str) -> set[str]:
        """A computation and all that it calls."""
        inside, waiting = set(), [computation]
        while waiting:
            name = waiting.pop()
            if name not in inside:
                inside.add(name)
                for one in self.computations.get(name, {}).values():
                    waiting += one.called
        return inside

    def within(self, computation: str) -> Iterator[Instruction]:
        """The instructions of a computation and of all that it calls."""
        for name in self.reached(computation):
            yield from self.computations.get(name, {}).values()

    def trips(self, inside: str, loop: Instruction) -> int:
        """How often a `while` of a computation runs its body.

        Without a note of the compiler it follows from a counter that is compared with a
        constant. Loops that end otherwise, such as that over tokens, run `turns` times.
        """
        if noted := _TRIPS.search(loop.rest):
            return int(noted[1])
        condition, body = _called("condition", loop), _called("body", loop)
        (test,) = [x for x in self.computations[condition].values() if x.root]
        if test.opcode != "compare" or "direction=LT" not in test.rest:
            return self._turns
        counter, limit = (self.computations[condition].get(x) for x in test.operands)
        at = None if counter is None else _index(counter)
        last = _constant(limit)
        if at is None or last is None:
            return self._turns
        (end,) = [x for x in self.computations[body].values() if x.root]
        added = self.computations[body].get(end.operands[at])
        step = self._added(body, added) if added is not None else 1
        started = self.computations[inside].get(loop.operands[0])
        first = 0
        if started is not None and started.opcode == "tuple":
            first = _constant(self.computations[inside].get(started.operands[at])) or 0
        return -(-(last - first) // step)

    def _added(self, inside: str, one: Instruction) -> int:
        """The constant that an addition adds; 1 where it is not seen."""
        lines = self.computations[inside]
        if one.opcode == "fusion":
            (one,) = [x for x in self.computations[one.called[0]].values() if x.root]
            lines = self._around(one)
        found = [_constant(lines.get(name)) for name in one.operands]
        steps = [x for x in found if x]
        return steps[0] if one.opcode == "add" and steps else 1

    def traffic(self, computation: str) -> dict[str, int]:
        """Bytes read from and written to main memory by each instruction, by name.

        Loops within it count as often as they run, of branches the one that moves most.
        """
        return {
            one.name: sum(self._moved(computation, one))
            for one in self.computations[computation].values()
        }

    def _moved(self, inside: str, one: Instruction) -> tuple[int, int]:
        """Bytes that an instruction reads and writes."""
        if one.opcode in _STILL or one.opcode.endswith("-done"):
            return 0, 0
        if one.opcode == "custom-call" and any(x in one.rest for x in _STILL_CALLS):
            return 0, 0
        if one.opcode in ("while", "conditional", "call"):
            most = max(sum(self.traffic(name).values()) for name in one.called)
            return most * (self.trips(inside, one) if one.opcode == "while" else 1), 0
        sources = [self.laid_of(inside, name) for name in one.operands]
        if one.opcode in ("copy-start", "slice-start"):
            # The result also names the source: (new, old) or ((old), new).
            new = one.result[one.opcode == "slice-start"]
            slow = any(not laid.fast for laid in sources[0])
            return new.size * slow, new.size * (not new.fast)
        read = 0
        for i, arrays in enumerate(sources):
            read += int(min(_slow(arrays), self._read(one, i)))
        return read, self._written(one)

    def laid_of(self, inside: str, name: str) -> tuple[Laid, ...]:
        """The arrays of a name within a computation; none if it is not there."""
        found = self.computations[inside].get(name)
        return found.result if found else ()

    def goes_on(self, inside: str, one: Instruction) -> bool:
        """Whether a line only goes on with a collective operation that another began.

        The compiler for TPUs cuts some into a chain of steps, each fused with a part of
        a product. All steps of a chain look like the whole operation.
        """
        if one.opcode not in COLLECTIVES or "chain_id=" not in one.rest:
            return False
        users = (
            x for x in self.computations[inside].values() if one.name in x.operands
        )
        return not any("AsyncCollectiveStart" in user.rest for user in users)

    def _read(self, one: Instruction, operand: int) -> float:
        """Most bytes that an instruction reads of an operand."""
        if one.opcode in _SLICES and operand == 0:
            return sum(laid.size for laid in one.result)
        if one.opcode in ("dynamic-update-slice", "scatter") and operand == 0:
            return 0
        if one.opcode != "fusion":
            return math.inf
        return self._read_inside(one.called[0], operand)

    @functools.cache  # noqa: B019 - programs live as long as the script
    def _read_inside(self, computation: str, parameter: int) -> float:
        lines = self.computations[computation]
        names = [
            one.name
            for one in lines.values()
            if one.opcode == "parameter" and one.number == parameter
        ]
        total = 0.0
        while names:
            name = names.pop()
            for user in lines.values():
                for at in [i for i, x in enumerate(user.operands) if x == name]:
                    if user.opcode == "bitcast" or self._renames(user):
                        names.append(user.name)
                    elif not self._hands_on(computation, user):
                        total += self._read(user, at)
        return total

    def _hands_on(self, computation: str, one: Instruction) -> bool:
        """Whether a step of a chain leaves its operands where they are."""
        if one.opcode == "tuple" and one.root:
            return any(
                self.goes_on(computation, x)
                for x in self.computations[computation].values()
            )
        return self.goes_on(computation, one)

    def _renames(self, one: Instruction) -> bool:
        """Whether a fusion only gives an array another shape."""
        if one.opcode != "fusion":
            return False
        inside = self.computations[one.called[0]].values()
        return all(x.opcode in ("parameter", "bitcast") for x in inside)

    def _written(self, one: Instruction) -> int:
        """Bytes that an instruction writes to main memory."""
        parts, still = [one], ()
        if one.opcode == "fusion":
            lines = self.computations[one.called[0]]
            (root,) = [x for x in lines.values() if x.root]
            names = root.operands if root.opcode == "tuple" else [root.name]
            parts = [lines[name] for name in names]
            if root.opcode == "tuple" and self._hands_on(one.called[0], root):
                still = (*COLLECTIVES, "parameter")
        total = 0
        for part, laid in zip(parts, one.result, strict=False):
            if not (laid.fast or part.opcode in still):
                total += self._update_of(part, laid)
        return total

    def _update_of(self, part: Instruction, laid: Laid) -> int:
        lines = self._around(part)
        while part.opcode == "bitcast" and part.operands[0] in lines:
            part = lines[part.operands[0]]
        if part.opcode == "fusion":
            return self._written(part)
        if part.opcode == "dynamic-update-slice":
            # Without its tiles: those of a single column are nearly empty.
            (new,) = lines[part.operands[1]].result
            return math.prod(new.shape) * new.item
        return laid.size

    def _around(self, one: Instruction) -> dict[str, Instruction]:
        """The computation in which an instruction stands."""
        return next(x for x in self.computations.values() if x.get(one.name) is one)


def _called(role: str, one: Instruction) -> str:
    """The computation with a role in an instruction."""
    (name,) = re.findall(rf"\b{role}=%?([\w.\-]+)", one.rest)
    return name


def _index(one: Instruction) -> int | None:
    """Which element of a tuple an instruction takes; None if it does not."""
    found = re.search(r"index=(\d+)", one.rest)
    return int(found[1]) if found and one.opcode == "get-tuple-element" else None


def _constant(one: Instruction | None) -> int | None:
    """The value of a whole constant; None for anything else."""
    if one is None or one.opcode != "constant":
        return None
    return int(one.operands[0]) if re.fullmatch(r"-?\d+", one.operands[0]) else None


def _instruction(found: re.Match[str]) -> Instruction:
    _, name, kind, opcode, rest = found.groups()
    end = _end_of_operands(rest)
    inside = re.sub(r"/\*.*?\*/", "", rest[:end])
    operands = (
        [inside]
        if opcode in ("parameter", "constant")
        else re.findall(r"%([\w.\-]+)", inside)
    )
    return Instruction(
        name, opcode, laid(kind), tuple(operands), rest[end:], found[1] is not None
    )


def _end_of_operands(rest: str) -> int:
    depth = 1
    for at, char in enumerate(rest):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return at
    return len(rest)


def laid(kind: str) -> tuple[Laid, ...]:
    """The arrays of a type as the text writes it, `bf16[8,64]{1,0:T(8,128)S(1)}`."""
    return tuple(_one(*found) for found in _ARRAY.findall(kind))


def _one(dtype: str, dims: str, order: str, how: str) -> Laid:
    shape = tuple(int(n) for n in dims.split(",") if n)
    filled = [shape[int(axis)] for axis in order.split(",") if axis]
    if tile := re.search(r"T\(([\d,]+)\)", how):
        # Tiles cover the innermost axes, which the layout names first.
        for axis, size in enumerate(reversed(tile[1].split(","))):
            if axis < len(filled):
                filled[axis] = -(-filled[axis] // int(size)) * int(size)
    bits = re.search(r"\d+", dtype)
    item = max(int(bits[0]) // 8, 1) if bits and dtype != "pred" else 1
    return Laid(dtype, shape, item, math.prod(filled or shape) * item, "S(1)" in how)


def _slow(arrays: tuple[Laid, ...]) -> int:
    return sum(x.size for x in arrays if not x.fast)
