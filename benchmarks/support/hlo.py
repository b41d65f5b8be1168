"""Reading a compiled program: its matrix products and the bytes that it moves.

The text is what `jax.stages.Compiled.as_text` prints of XLA's optimised HLO. An instruction of the
entry, or of a loop or a branch that it runs, reads its operands from the device's memory and writes
its results there; what happens inside a fusion stays on the chip. So bytes are counted as XLA's own
cost analysis does: every operand and every result once, of a slice, a gather or an update in place
only its part, and nothing for arrays that the compiler placed in a TPU's on-chip memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

ITEM_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)
_TRIPS = re.compile(r'known_trip_count"?[:=]\s*\{"?n"?[:=]\s*"?(\d+)')
_ON_CHIP = re.compile(r"S\([1-9]\)")

# What changes neither values nor, by itself, memory.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
    "partition-id", "replica-id", "opt-barrier", "copy-done", "slice-done", "async-done", "domain",
}  # fmt: skip
_MOVES = {"bitcast", "reshape", "copy", "transpose", "broadcast"}
_PARTS = {"dynamic-slice", "slice", "gather"}
_GEMM = re.compile(r"gemm|matmul", re.IGNORECASE)


@dataclass(frozen=True)
class Shape:
    """One array of a type: its dtype, dims, and whether it lies in on-chip memory."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """In the device's memory: none of an array that lies on the chip."""
        return 0 if self.on_chip else self.size * ITEM_BYTES.get(self.dtype, 0)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line; `computation` is the name of the one it stands in."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    computation: str

    @property
    def called(self) -> list[str]:
        """Computations that it is made of: a fusion's, a loop's body."""
        return _CALLED.findall(self.attributes)


@dataclass(frozen=True)
class Product:
    """A matrix product: the dtypes and dims of operands and result, and what it costs."""

    lhs: Shape
    rhs: Shape
    result: Shape
    depth: int
    algorithm: str
    times: int

    @property
    def flops(self) -> float:
        """A multiply-add counted as two."""
        return 2.0 * self.result.size * self.depth * self.times

    @property
    def is_bfloat16(self) -> bool:
        """Are both operands of that type?"""
        return self.lhs.dtype == self.rhs.dtype == "bf16"

    @property
    def types(self) -> str:
        """Of operands and result."""
        return f"{self.lhs.dtype} x {self.rhs.dtype} -> {self.result.dtype}"


@dataclass(frozen=True)
class Executed:
    """An instruction that runs: the arrays that it reads and writes, and its products.

    `read` and `written` hold (shape, bytes) of each array, `times` how often it runs.
    """

    instruction: Instruction
    read: tuple[tuple[Shape, int], ...]
    written: tuple[tuple[Shape, int], ...]
    products: tuple[Product, ...]
    times: int

    @property
    def bytes(self) -> int:
        """Read and written, in all its runs."""
        return self.times * sum(count for _, count in self.read + self.written)


class Module:
    """A compiled program."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        inside = ""
        for line in text.splitlines():
            if (header := _HEADER.match(line)) is not None:
                inside = header[2]
                self.computations[inside] = {}
                self.entry = inside if header[1] else self.entry
            elif inside and (found := _INSTRUCTION.match(line)) is not None:
                own = _instruction(found, computation=inside)
                self.computations[inside][own.name] = own

    @cached_property
    def executed(self) -> list[Executed]:
        """What runs, in the order of the text; loops of unknown length are left out."""
        return list(self._walk(self.entry, 1))

    @cached_property
    def unknown_loops(self) -> int:
        """Loops whose length the compiler doesn't know."""
        every = (one for own in self.computations.values() for one in own.values())
        return sum(one.opcode == "while" and not _TRIPS.search(one.attributes) for one in every)

    def operands(self, one: Instruction) -> list[Instruction]:
        """The instructions whose results it takes."""
        own = self.computations[one.computation]
        return [own[name] for name in one.operands if name in own]

    def users(self, one: Instruction) -> list[Instruction]:
        """The instructions that take its result."""
        return [
            other
            for other in self.computations[one.computation].values()
            if one.name in other.operands
        ]

    def root(self, computation: str) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(one for one in self.computations[computation].values() if one.is_root)

    def roots(self, one: Instruction) -> list[Instruction]:
        """What makes each of a fusion's results; of another instruction, itself."""
        if one.opcode != "fusion":
            return [one]
        root = self.root(one.called[0])
        return self.operands(root) if root.opcode == "tuple" else [root]

    def parameters(self, one: Instruction) -> list[Instruction]:
        """Of a fusion the parameters, in the order of its operands."""
        own = self.computations[one.called[0]].values()
        found = [other for other in own if other.opcode == "parameter"]
        return sorted(found, key=lambda other: int(other.attributes.split(")")[0]))

    def only(self, one: Instruction, opcodes: set[str]) -> bool:
        """Does it do nothing but what these say, whatever it does to layouts on the way?"""
        done = {other.opcode for other in self.inside(one)} - FREE - _MOVES - {"fusion"}
        moved = {other.opcode for other in self.inside(one)} & _MOVES
        return bool(opcodes & (done | moved)) and done <= opcodes

    def uses(self, one: Instruction, number: int) -> Iterator[Instruction]:
        """What reads one of its results, of a fusion the instructions inside that do."""
        holders = [one]
        if len(one.shapes) > 1:
            taken = f"index={number}"
            parts = (user for user in self.users(one) if user.opcode == "get-tuple-element")
            holders = [part for part in parts if re.search(rf"{taken}\b", part.attributes)]
        for holder in holders:
            for user in self.users(holder):
                if user.opcode in ("bitcast", "get-tuple-element", "copy", "reshape"):
                    yield from self.uses(user, 0)
                elif user.opcode != "fusion":
                    yield user
                else:
                    places = (place for place, name in enumerate(user.operands))
                    for place in places:
                        if user.operands[place] == holder.name:
                            yield from self.uses(self.parameters(user)[place], 0)

    def inside(self, one: Instruction) -> Iterator[Instruction]:
        """Itself and all that it is made of."""
        yield one
        if one.opcode != "while":
            for name in one.called:
                for other in self.computations.get(name, {}).values():
                    yield from self.inside(other)

    def _walk(self, computation: str, times: int) -> Iterator[Executed]:
        for one in self.computations[computation].values():
            if one.opcode == "while":
                trips = _TRIPS.search(one.attributes)
                if trips is not None:
                    yield from self._walk(one.called[0], times * int(trips[1]))
            elif one.opcode == "conditional":
                names = (a or b for a, b in _BRANCHES.findall(one.attributes))
                branches = [
                    list(self._walk(name.strip().lstrip("%"), times))
                    for group in names
                    for name in group.split(",")
                ]
                # The branch that is cheaper is the one meant to be taken.
                yield from min(branches, key=lambda own: sum(other.bytes for other in own))
            elif one.opcode == "call":
                yield from self._walk(one.called[0], times)
            elif one.opcode not in FREE:
                yield self._executed(one, times)

    def _executed(self, one: Instruction, times: int) -> Executed:
        operands = [shape for other in self.operands(one) for shape in other.shapes[:1]]
        read = [(shape, shape.bytes) for shape in operands]
        written = [(shape, shape.bytes) for shape in one.shapes]
        if one.opcode == "fusion":
            parameters = self.parameters(one)
            read = [
                (shape, self._read_of(inner, shape))
                for shape, inner in zip(operands, parameters, strict=False)
            ]
            written = [
                (shape, self._written_of(root, shape))
                for shape, root in zip(one.shapes, self.roots(one), strict=False)
            ]
        elif one.opcode.endswith("-start"):  # the result's type holds the operands' too
            part = min(one.shapes[:2], key=lambda shape: shape.size)
            whole = [shape for shape in one.shapes[:2] if not shape.on_chip]
            read, written = [(shape, part.size * ITEM_BYTES[part.dtype]) for shape in whole], []
        elif one.opcode in _PARTS:
            read = [(shape, min(shape.bytes, written[0][1])) for shape in operands[:1]]
        elif one.opcode == "dynamic-update-slice":
            read, written = read[1:2], [(one.shapes[0], operands[1].bytes)]
        elif one.opcode == "custom-call" and "Bitcast" in one.attributes:
            read, written = [], []
        products = tuple(self._products(one, times))
        return Executed(one, tuple(read), tuple(written), products, times)

    def _read_of(self, parameter: Instruction, shape: Shape) -> int:
        """Of a fusion's parameter: less than all where only parts of it are used."""
        if shape.on_chip:
            return 0
        total, waiting = 0, [parameter]
        while waiting:
            one = waiting.pop()
            for user in self.users(one):
                if user.opcode in ("bitcast", "reshape"):
                    waiting.append(user)
                elif user.opcode in _PARTS and user.operands[0] == one.name:
                    total += user.shapes[0].size * ITEM_BYTES[shape.dtype]
                elif user.opcode in ("dynamic-update-slice", "scatter") and (
                    user.operands[0] == one.name
                ):
                    continue
                else:
                    return shape.bytes
        return min(total, shape.bytes)

    def _written_of(self, root: Instruction, shape: Shape) -> int:
        while root.opcode in ("bitcast", "reshape"):
            root = self.operands(root)[0]
        if root.opcode != "dynamic-update-slice" or shape.on_chip:
            return shape.bytes
        return min(shape.bytes, self.operands(root)[1].shapes[0].size * ITEM_BYTES[shape.dtype])

    def _products(self, one: Instruction, times: int) -> Iterator[Product]:
        for inner in self.inside(one):
            is_gemm = inner.opcode == "custom-call" and _GEMM.search(inner.attributes)
            if inner.opcode in ("dot", "convolution") or is_gemm:
                lhs, rhs = (other.shapes[0] for other in self.operands(inner)[:2])
                result = inner.shapes[0]
                # |lhs| |rhs| |result| is the square of rows x columns x depth.
                depth = math.isqrt(lhs.size * rhs.size // max(result.size, 1))
                yield Product(lhs, rhs, result, depth, _algorithm(inner), times)


def _algorithm(one: Instruction) -> str:
    """How the product is to be made, where that is said; `convolution` and `dot` say it alike."""
    told = re.search(r"algorithm=(\w+)", one.attributes) or re.search(
        r"operand_precision=\{(\w+)", one.attributes
    )
    if told is None:
        told = re.search(r'"operand_precision":\["(\w+)"', one.attributes)
    return "" if told is None or told[1].lower() == "default" else told[1].lower()


def _instruction(found: re.Match[str], *, computation: str) -> Instruction:
    rest = found[3]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes = tuple(
        Shape(
            dtype,
            tuple(int(dim) for dim in dims.split(",") if dim),
            on_chip=bool(_ON_CHIP.search(layout)),
        )
        for dtype, dims, layout in _ARRAY.findall(rest[:end])
    )
    opened = rest.index("(", end)
    closed = _closing(rest, opened)
    opcode, arguments = rest[end:opened].strip(), rest[opened + 1 : closed]
    names = tuple(re.findall(r"%([\w.\-]+)", arguments))
    kept = arguments if opcode == "parameter" else ""
    return Instruction(
        found[2], shapes, opcode, names, kept + rest[closed:], bool(found[1]), computation
    )


def _closing(text: str, opened: int) -> int:
    """Where the parenthesis that opens here is closed."""
    depth = 0
    for place in range(opened, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"a parenthesis isn't closed: {text[:80]}")
