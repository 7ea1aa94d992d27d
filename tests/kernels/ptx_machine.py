"""Runs the PTX of a kernel without a GPU: NumPy instructions over all threads of the grid at once.

What runs is what NVVM compiled, not a rewrite of it: a wrong type, a contracted multiply-add, a misaligned or
out-of-bounds access, or a shuffle that some lanes never reach shows here. What does not show: races between threads of
different blocks (blocks run together, or one after the other, never interleaved), the memory order that fences give,
and time.

Threads at the lowest instruction go first; at `bar.sync` and `shfl.sync` threads wait for their block or warp. Memory
is the host's: only addresses inside the arrays that were passed to `expose` can be read or written.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qoda_kernels.reference import fused_multiply_add

Array = npt.NDArray[Any]
_DTYPES = {
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "pred": np.dtype(bool),
}
_REGISTERS = {"pred": "pred", "b16": "u16", "b32": "u32", "b64": "u64", "f32": "f32", "f64": "f64", "u16": "u16"}
_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "neu": lambda a, b: ~(a == b),
    "equ": lambda a, b: (a == b) | np.isnan(a) | np.isnan(b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}


class PtxError(Exception):
    """The program did what a GPU forbids, or uses an instruction that this machine does not know."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: guard register ("" for none, "!" in front for its negation), operation, operands."""

    guard: str
    operation: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """One kernel."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    registers: dict[str, str]
    parameters: tuple[tuple[str, str], ...]
    shared: dict[str, int]
    dynamic_shared: str | None

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Program of a PTX file with one entry."""
        text = re.sub(r"//[^\n]*", "", text)
        shared = {name: int(size) for name, size in re.findall(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\]", text)}
        dynamic = re.search(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\]", text)
        header, body = re.search(r"\.entry \w+\s*\((.*?)\)[^{]*\{(.*)\}", text, re.DOTALL).groups()  # type: ignore[union-attr]  # one entry
        parameters = tuple((name, kind) for kind, name in re.findall(r"\.param \.(\w+) (\w+)", header))
        registers = {prefix: _REGISTERS[kind] for kind, prefix in re.findall(r"\.reg \.(\w+)\s+%(\w+)<", body)}
        instructions, labels = [], {}
        for statement in re.split(r"[;\n]", re.sub(r"\.reg [^;]*;", "", body)):
            statement = statement.strip()
            if not statement:
                continue
            if statement.endswith(":"):
                labels[statement[:-1]] = len(instructions)
                continue
            found = re.fullmatch(r"(?:@(!?)%(\w+)\s+)?([\w.]+)\s*(.*)", statement)
            if found is None:
                raise PtxError(f"cannot read {statement!r}")
            negated, guard, operation, rest = found.groups()
            operands = tuple(part.strip() for part in re.split(r",(?![^{]*\})", rest) if part.strip())
            instructions.append(Instruction((negated or "") + (guard or ""), operation, operands))
        return cls(tuple(instructions), labels, registers, parameters, shared, dynamic and dynamic.group(1))

    def count(self, pattern: str) -> int:
        """Number of instructions whose operation matches a regular expression from its start."""
        return sum(re.match(pattern, instruction.operation) is not None for instruction in self.instructions)


@dataclass
class Memory:
    """The arrays that a kernel may touch."""

    starts: list[int] = field(default_factory=list)
    parts: list[Array] = field(default_factory=list)

    def expose(self, array: Array) -> None:
        """Allow access to a contiguous array's bytes."""
        if array.nbytes:
            self.parts.append(array.reshape(-1).view(np.uint8))
            self.starts.append(array.__array_interface__["data"][0])

    def _locate(self, addresses: Array, size: int, alignment: int) -> list[tuple[Array, Array, Array]]:
        """For each array: the threads that touch it, it, and the [threads, size] indices of its bytes."""
        if np.any(addresses % np.uint64(alignment)):
            raise PtxError(f"misaligned access of {alignment} bytes")
        order = np.argsort(self.starts, kind="stable")
        starts = np.array(self.starts, dtype=np.uint64)[order]
        where = np.searchsorted(starts, addresses, side="right") - 1
        if np.any(where < 0):
            raise PtxError("access below all arrays")
        located = []
        for index in np.unique(where):
            threads = np.flatnonzero(where == index)
            part = self.parts[order[index]]
            first = (addresses[threads] - starts[index]).astype(np.int64)
            if np.any(first + size > part.size):
                raise PtxError(f"access at byte {first.max()} of an array of {part.size} bytes")
            located.append((threads, part, first[:, None] + np.arange(size)))
        return located

    def load(self, addresses: Array, size: int, alignment: int) -> Array:
        """Bytes [threads, size]."""
        values = np.empty((addresses.size, size), dtype=np.uint8)
        for threads, part, places in self._locate(addresses, size, alignment):
            values[threads] = part[places]
        return values

    def store(self, addresses: Array, values: Array) -> None:
        """Write bytes [threads, size]; of several threads at one address the last wins."""
        for threads, part, places in self._locate(addresses, values.shape[1], values.shape[1]):
            part[places] = values[threads]


class Machine:
    """Runs one program."""

    def __init__(self, program: Program, memory: Memory) -> None:
        self._program = program
        self._memory = memory

    def launch(
        self, blocks: int, threads: int, arguments: Sequence[int | float], shared_bytes: int, *, together: bool = True
    ) -> None:
        """Run a grid.

        Args:
            blocks: number of blocks.
            threads: per block, a multiple of 32.
            arguments: of the kernel.
            shared_bytes: dynamic shared memory of a block.
            together: all blocks in lock step; otherwise one after the other.
        """
        with np.errstate(all="ignore"):
            groups = [range(blocks)] if together else [range(block, block + 1) for block in range(blocks)]
            for group in groups:
                _Run(self._program, self._memory, blocks, group, threads, arguments, shared_bytes).run()


class _Run:
    """State of the threads of some blocks."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        grid: int,
        blocks: range,
        threads: int,
        arguments: Sequence[int | float],
        shared_bytes: int,
    ) -> None:
        self.program, self.memory, self.block_threads = program, memory, threads
        self.size = len(blocks) * threads
        self.registers: dict[str, Array] = {}
        index = np.arange(self.size, dtype=np.uint32)
        self.block = index // np.uint32(threads)
        self.special = {
            "%tid.x": index % np.uint32(threads),
            "%ctaid.x": self.block + np.uint32(blocks.start),
            "%nctaid.x": np.full(self.size, grid, dtype=np.uint32),
            "%ntid.x": np.full(self.size, threads, dtype=np.uint32),
            "%dynamic_smem_size": np.full(self.size, shared_bytes, dtype=np.uint32),
        }
        self.parameters = {
            name: np.full(self.size, argument, dtype=_DTYPES[kind])
            for (name, kind), argument in zip(program.parameters, arguments, strict=True)
        }
        offset, self.symbols = 0, {}
        for name, size in program.shared.items():
            self.symbols[name] = offset
            offset += size + -size % 16
        if program.dynamic_shared is not None:
            self.symbols[program.dynamic_shared] = offset
            offset += shared_bytes
        self.shared = np.zeros((len(blocks), offset), dtype=np.uint8)
        self.position = np.zeros(self.size, dtype=np.int64)
        self.waiting = np.zeros(self.size, dtype=bool)
        self.end = len(program.instructions)

    def run(self) -> None:
        while True:
            ready = np.where(self.waiting, self.end, self.position)
            lowest = int(ready.min())
            if lowest == self.end:
                if self.waiting.any():
                    raise PtxError("threads wait for others that never come")
                return
            self._straight(lowest, np.flatnonzero(ready == lowest))

    def _straight(self, position: int, active: Array) -> None:
        """Run threads that stand at one instruction up to the next branch, barrier or label."""
        labels = set(self.program.labels.values())
        while True:
            instruction = self.program.instructions[position]
            name = instruction.operation
            if name.startswith(("bar.sync", "bar.warp.sync", "shfl.sync")):
                self._meet(instruction, position, active)
                return
            if name.startswith("bra") or name == "ret":
                taken = self._guarded(instruction, active)
                self.position[active] = position + 1
                self.position[taken] = self.end if name == "ret" else self.program.labels[instruction.operands[0]]
                return
            self._execute(instruction, self._guarded(instruction, active))
            position += 1
            if position in labels:
                self.position[active] = position
                return

    def _guarded(self, instruction: Instruction, active: Array) -> Array:
        if not instruction.guard:
            return active
        holds = self.registers[instruction.guard.removeprefix("!")][active]
        return active[~holds if instruction.guard.startswith("!") else holds]

    def _meet(self, instruction: Instruction, position: int, active: Array) -> None:
        """Let threads wait; go on with the warps (of a shuffle) or blocks (of a barrier) that are complete."""
        group = self.block_threads if instruction.operation.startswith("bar.sync") else 32
        self.position[active] = position
        self.waiting[active] = True
        there = (self.waiting & (self.position == position)).reshape(-1, group).all(axis=1)
        arrived = np.flatnonzero(np.repeat(there, group))
        if not arrived.size:
            return
        if instruction.operation.startswith("shfl"):
            self._shuffle(instruction, arrived)
        elif group == 32 and np.any(self._read(instruction.operands[0], "u32", arrived) != 0xFFFFFFFF):
            raise PtxError("a barrier of a warp must be of all lanes")
        self.waiting[arrived] = False
        self.position[arrived] = position + 1

    def _shuffle(self, instruction: Instruction, active: Array) -> None:
        if instruction.operation != "shfl.sync.bfly.b32":
            raise PtxError(f"unknown instruction {instruction.operation}")
        destination, source, distance, clamp, mask = instruction.operands
        if np.any(self._read(mask, "u32", active) != 0xFFFFFFFF) or np.any(self._read(clamp, "u32", active) != 31):
            raise PtxError("a shuffle must be of all lanes")
        partner = active ^ self._read(distance, "u32", active).astype(np.int64)
        whole = np.arange(self.size)
        self._write(destination.split("|")[0], "u32", active, self._read(source, "u32", whole)[partner])

    def _read(self, operand: str, kind: str, active: Array) -> Array:
        """An operand's values for the active threads, as a type."""
        dtype = _DTYPES[kind]
        if operand in self.special:
            values = self.special[operand][active]
        elif operand.startswith("%"):
            values = self.registers[operand[1:]][active]
        elif operand in self.symbols:
            values = np.full(active.size, self.symbols[operand], dtype=np.uint64)
        elif operand.startswith("0f"):
            values = np.full(active.size, int(operand[2:], 16), dtype=np.uint32).view(np.float32)
        elif operand.startswith("0d"):
            values = np.full(active.size, int(operand[2:], 16), dtype=np.uint64).view(np.float64)
        else:
            bits = int(operand, 0) % 2 ** (8 * dtype.itemsize)
            return np.full(active.size, bits, dtype=f"u{dtype.itemsize}").view(dtype)
        if values.dtype == dtype:
            return values
        if values.dtype.itemsize == dtype.itemsize:
            return values.view(dtype)
        return values.astype(f"u{dtype.itemsize}").view(dtype)  # the low bits

    def _write(self, operand: str, kind: str, active: Array, values: Array) -> None:
        """Set a register; narrower unsigned values are extended with zeros, signed ones with the sign."""
        name = operand.removeprefix("%")
        if name not in self.registers:
            declared = self.program.registers[name.rstrip("0123456789")]
            self.registers[name] = np.zeros(self.size, dtype=_DTYPES[declared])
        register = self.registers[name]
        values = np.asarray(values, dtype=_DTYPES[kind])
        if values.dtype != register.dtype:
            if values.dtype.itemsize == register.dtype.itemsize:
                values = values.view(register.dtype)
            else:
                values = values.astype(register.dtype)
        register[active] = values

    def _address(self, operand: str, active: Array) -> Array:
        base, _, offset = operand.strip("[]").partition("+")
        return self._read(base, "u64", active) + np.uint64(int(offset or "0") % 2**64)

    def _execute(self, instruction: Instruction, active: Array) -> None:
        if not active.size:
            return
        parts = instruction.operation.split(".")
        name, kind, operands = parts[0], parts[-1], instruction.operands
        if name in ("ld", "st", "atom", "red"):
            self._access(parts, operands, active)
        elif name == "setp":
            result = _COMPARISONS[parts[1]](*(self._read(o, kind, active) for o in operands[1:]))
            self._write(operands[0], "pred", active, result)
        elif name == "selp":
            choice = self._read(operands[3], "pred", active)
            values = (self._read(o, kind, active) for o in operands[1:3])
            self._write(operands[0], kind, active, np.where(choice, *values))
        elif name == "cvt":
            self._write(operands[0], parts[-2], active, _convert(parts, self._read(operands[1], kind, active)))
        elif name == "mov" and operands[0].startswith("{"):
            self._unpack(operands, kind, active)
        elif name == "mov" and operands[1].startswith("{"):
            low, high = (self._read(o, f"u{_DTYPES[kind].itemsize * 4}", active) for o in _braces(operands[1]))
            self._write(operands[0], kind, active, np.stack([low, high], axis=1).reshape(-1).view(_DTYPES[kind]))
        elif name == "mul" and "wide" in parts:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            first, second = (self._read(o, kind, active).astype(_DTYPES[wide]) for o in operands[1:])
            self._write(operands[0], wide, active, first * second)
        elif name == "mad" and "wide" in parts:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            first, second = (self._read(o, kind, active).astype(_DTYPES[wide]) for o in operands[1:3])
            self._write(operands[0], wide, active, first * second + self._read(operands[3], wide, active))
        elif name in ("shl", "shr"):
            value, distance = self._read(operands[1], kind, active), self._read(operands[2], "u32", active)
            self._write(operands[0], kind, active, _shift(name, value, distance))
        elif name == "prmt":
            self._write(operands[0], kind, active, _permuted(*(self._read(o, kind, active) for o in operands[1:])))
        elif name in ("bfi", "bfe"):
            self._bit_field(name, operands, kind, active)
        elif name in ("membar", "fence"):
            return
        elif (key := _simplified(parts)) in _ARITHMETIC and not (name == "fma" and kind != "f32"):
            values = tuple(self._read(o, kind, active) for o in operands[1:])
            self._write(operands[0], kind, active, _ARITHMETIC[key](*values))
        else:
            raise PtxError(f"unknown instruction {instruction.operation}")

    def _unpack(self, operands: tuple[str, ...], kind: str, active: Array) -> None:
        half = f"u{_DTYPES[kind].itemsize * 4}"
        halves = self._read(operands[1], kind, active).view(_DTYPES[half]).reshape(-1, 2)
        for index, name in enumerate(_braces(operands[0])):
            self._write(name, half, active, np.ascontiguousarray(halves[:, index]))

    def _bit_field(self, name: str, operands: tuple[str, ...], kind: str, active: Array) -> None:
        dtype = _DTYPES[kind]
        position, length = (self._read(o, "u32", active).astype(dtype) for o in operands[-2:])
        one = dtype.type(1)
        mask = _shift("shl", np.full_like(length, 1), length) - one
        if name == "bfe":
            result = _shift("shr", self._read(operands[1], kind, active), position) & mask
        else:
            field_bits, base = (self._read(o, kind, active) for o in operands[1:3])
            result = (base & ~_shift("shl", mask, position)) | _shift("shl", field_bits & mask, position)
        self._write(operands[0], kind, active, result)

    def _access(self, parts: list[str], operands: tuple[str, ...], active: Array) -> None:
        name, space, kind = parts[0], parts[1], parts[-1]
        size = _DTYPES[kind].itemsize
        if space == "param":
            self._write(operands[0], kind, active, self.parameters[operands[1].strip("[]")][active])
        elif name == "ld" and "v4" in parts:
            addresses = self._address(operands[1], active)
            values = self.memory.load(addresses, 4 * size, 4 * size).view(_DTYPES[kind])
            for index, register in enumerate(_braces(operands[0])):
                self._write(register, kind, active, np.ascontiguousarray(values[:, index]))
        elif name == "ld" and space in ("global", "shared"):
            addresses = self._address(operands[1], active)
            data = (
                self.memory.load(addresses, size, size) if space == "global" else self._shared(addresses, size, active)
            )
            self._write(operands[0], kind, active, data.view(_DTYPES[kind])[:, 0])
        elif name == "st" and space in ("global", "shared"):
            addresses = self._address(operands[0], active)
            data = np.ascontiguousarray(self._read(operands[1], kind, active)).view(np.uint8).reshape(-1, size)
            if space == "global":
                self.memory.store(addresses, data)
            else:
                self.shared[self._shared_places(addresses, size, active)] = data
        elif name in ("atom", "red") and space == "global":
            self._atomic(parts, operands, active)
        else:
            raise PtxError(f"unknown instruction {'.'.join(parts)}")

    def _shared_places(self, addresses: Array, size: int, active: Array) -> tuple[Array, Array]:
        if np.any(addresses % np.uint64(size)) or np.any(addresses + np.uint64(size) > self.shared.shape[1]):
            raise PtxError("access to shared memory is misaligned or out of bounds")
        return self.block[active][:, None], addresses.astype(np.int64)[:, None] + np.arange(size)

    def _shared(self, addresses: Array, size: int, active: Array) -> Array:
        return np.ascontiguousarray(self.shared[self._shared_places(addresses, size, active)])

    def _atomic(self, parts: list[str], operands: tuple[str, ...], active: Array) -> None:
        """One thread after the other."""
        kind, operation = parts[-1], parts[-2]
        dtype = _DTYPES[kind]
        combine = {"add": np.add, "max": np.maximum, "min": np.minimum}[operation]
        is_atom = parts[0] == "atom"
        addresses = self._address(operands[1 if is_atom else 0], active)
        values = self._read(operands[-1], kind, active)
        former = np.empty(active.size, dtype=dtype)
        for index in range(active.size):
            place = addresses[index : index + 1]
            former[index] = self.memory.load(place, dtype.itemsize, dtype.itemsize).view(dtype)[0, 0]
            updated = combine(former[index : index + 1], values[index : index + 1])
            self.memory.store(place, updated.view(np.uint8).reshape(1, -1))
        if is_atom:
            self._write(operands[0], kind, active, former)


def _braces(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{}").split(",")]


def _shift(name: str, value: Array, distance: Array) -> Array:
    """Shift; distances of the width or more give 0, or copies of the sign."""
    width = 8 * value.dtype.itemsize
    if name == "shr" and value.dtype.kind == "i":
        return value >> np.minimum(distance, width - 1).astype(value.dtype)
    shifted = np.minimum(distance, width - 1).astype(value.dtype)
    result = value << shifted if name == "shl" else value >> shifted
    return np.where(distance >= width, value.dtype.type(0), result)


def _permuted(low: Array, high: Array, selector: Array) -> Array:
    """Bytes of the pair (high, low): nibble n of the selector says which one, or whose sign, becomes byte n."""
    pair = high.astype(np.uint64) << np.uint64(32) | low
    result = np.zeros_like(pair)
    for byte in range(4):
        nibble = selector.astype(np.uint64) >> np.uint64(4 * byte)
        found = pair >> (np.uint64(8) * (nibble & np.uint64(7))) & np.uint64(0xFF)
        of_sign = (found >> np.uint64(7)) * np.uint64(0xFF)
        result |= np.where(nibble & np.uint64(8), of_sign, found) << np.uint64(8 * byte)
    return result.astype(np.uint32)


def _convert(parts: list[str], value: Array) -> Array:
    target, rounding = _DTYPES[parts[-2]], parts[1]
    if "sat" in parts or "ftz" in parts:
        raise PtxError(f"unknown instruction {'.'.join(parts)}")
    if value.dtype.kind == "f" and target.kind != "f":
        whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding](value)
        if np.any(~np.isfinite(whole)):
            raise PtxError("conversion of a number that is not finite")
        return whole.astype(target)
    if target == np.float16:
        return np.where(np.isnan(value), np.uint16(0x7FFF).view(np.float16), value.astype(np.float16))
    return value.astype(target)


def _simplified(parts: list[str]) -> str:
    """Name of an operation without its type, with its rounding if it has one."""
    return ".".join([*parts[:-1], "f"]) if parts[-1].startswith("f") else ".".join(parts[:-1])


def _float_minimum(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.minimum(a, b)))


_ARITHMETIC: dict[str, Callable[..., Array]] = {
    "mov": lambda a: a,
    "mov.f": lambda a: a,
    "add": np.add,
    "sub": np.subtract,
    "mul.lo": np.multiply,
    "mad.lo": lambda a, b, c: a * b + c,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "div": np.floor_divide,
    "rem": np.remainder,
    "add.f": np.add,
    "add.rn.f": np.add,
    "sub.f": np.subtract,
    "sub.rn.f": np.subtract,
    "mul.f": np.multiply,
    "mul.rn.f": np.multiply,
    "fma.rn.f": fused_multiply_add,
    "min.f": _float_minimum,
    "abs.f": np.abs,
    "neg.f": np.negative,
    "div.rn.f": np.divide,
    "sqrt.rn.f": np.sqrt,
}
