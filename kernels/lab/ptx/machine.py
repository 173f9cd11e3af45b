"""The machine: registers as numpy rows of one lane per thread, instructions decoded once into closures over them.

All threads of one CTA execute together; where they diverge, the group that stands lowest in the code runs first, until
the groups meet again. Barriers must be reached by every thread that has not left the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from headrace.kernels.lab.ptx.device_memory import DeviceMemory, pointer_roots, registers
from headrace.kernels.lab.ptx.parse import (
    WIDTHS,
    Immediate,
    Instruction,
    Operand,
    Program,
    PtxError,
    Register,
    Symbol,
    Vector,
)
from headrace.kernels.lab.ptx.shared_memory import SharedMemory
from headrace.kernels.lab.ptx.statistics import Statistics
from headrace.kernels.lab.ptx.values import UNSIGNED, Array, Mask, dtype

Step = Callable[[Mask], None]
Builder = Callable[["Machine", Instruction], Step]
BUILDERS: dict[str, Builder] = {}
"""First part of the opcode -> what makes an instruction's closure. Filled by the modules of instructions."""

WARP = 32
ENDLESS = 5_000_000  # blocks a CTA may execute before it is taken to hang


def instruction(*names: str) -> Callable[[Builder], Builder]:
    """Register a builder for opcodes whose first part is one of ``names``."""

    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


@dataclass
class Block:
    """Instructions without a branch, and where control goes from there."""

    steps: list[Step] = field(default_factory=list)
    opcodes: list[str] = field(default_factory=list)
    exit: Instruction | None = None  # None: falls through
    target: int = 0  # block a branch goes to
    predicate: Array | None = None
    executed: int = 0  # warp executions


class InFlight:
    """Bytes asked of memory and not yet there, as Statistics.bytes_in_flight defines them."""

    def __init__(self) -> None:
        self.pending: dict[str, list[int]] = {}  # register -> the one-element size of the load that will fill it
        self.clear()

    def clear(self) -> None:
        self.bytes = self.peak = 0
        self.pending.clear()

    def issue(self, size: int, names: list[str] | None = None) -> None:
        if names is not None:
            self.consume(names)
            load = [size]
            self.pending.update(dict.fromkeys(names, load))
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def consume(self, names: list[str]) -> None:
        for name in names:
            load = self.pending.pop(name, None)
            if load is not None:
                self.bytes -= load[0]
                load[0] = 0

    def alias(self, names: list[str], sources: list[str]) -> None:
        for source in sources:
            if source in self.pending:
                self.pending.update(dict.fromkeys(names, self.pending[source]))


class Machine:
    """One program with one launch's parameters, ready to run any of its CTAs."""

    def __init__(
        self,
        program: Program,
        memory: DeviceMemory,
        parameters: dict[str, int],
        pointers: dict[str, str],
        grid: tuple[int, int, int],
        shared_bytes: int,
    ) -> None:
        """parameters: bit patterns by parameter name; pointers: parameter name -> argument (buffer) name."""
        self.program, self.memory, self.parameters, self.grid = program, memory, parameters, grid
        self.statistics: Statistics = memory.statistics
        self.threads = program.threads
        self.warps = self.threads // WARP
        self.lanes = np.arange(self.threads)
        self.warp_of = self.lanes // WARP
        self.shared_base = -(-program.shared_bytes // 128) * 128  # dynamic shared memory comes after the static
        size = self.shared_base + shared_bytes
        self.shared = SharedMemory(size, _granule(program), self.statistics)
        self.local = np.zeros((self.threads, max(program.local_bytes, 1)), np.uint8)
        self.in_flight = InFlight()
        self.pointers = pointers
        self.roots = pointer_roots(program, set(pointers) | set(program.constants))
        self._allocate()
        self.blocks = self._decode()

    # ------------------------------------------------------------------ registers and operands

    def _allocate(self) -> None:
        by_width: dict[int, list[str]] = {}
        for name, bits in self.program.registers.items():
            by_width.setdefault(bits, []).append(name)
        self.registers: dict[str, Array] = {}
        self.files: list[Array] = []
        for bits, names in by_width.items():
            file = np.zeros((len(names), self.threads), np.bool_ if bits == 1 else UNSIGNED[bits])
            self.files.append(file)
            self.registers.update(zip(names, file, strict=True))
        self.special = {
            f"%{name}.{axis}": np.zeros(self.threads, np.uint32)
            for name in ("tid", "ntid", "ctaid", "nctaid")
            for axis in "xyz"
        }
        self.special["%tid.x"][:] = self.lanes
        self.special["%ntid.x"][:] = self.threads
        self.special["%ntid.y"][:] = self.special["%ntid.z"][:] = 1
        for axis, extent in zip("xyz", self.grid, strict=True):
            self.special[f"%nctaid.{axis}"][:] = extent
        self.special["%laneid"] = (self.lanes % WARP).astype(np.uint32)
        self.special["%warpid"] = self.warp_of.astype(np.uint32)

    def view(self, operand: Operand, kind: str, bits: int | None = None) -> Array:
        """A live view [threads] of an operand as PTX type ``kind``: reading it later sees the register of then.

        A wider register is seen by its low part; a constant is an array that nothing writes. Packed types (f32x2)
        come as [threads, 2].
        """
        bits = WIDTHS[kind] if bits is None else bits
        if "x2" in kind and kind.split("x2")[0] in ("f32", "f16", "bf16", "u16", "s16"):
            half = kind.removesuffix("x2")
            whole = self.view(operand, f"b{bits}", bits)
            pairs: Array = np.ascontiguousarray(whole) if whole.strides != (bits // 8,) else whole
            return pairs.view(dtype(half, bits // 2)).reshape(self.threads, 2)
        wanted = dtype(kind, bits)
        if isinstance(operand, Register):
            if operand.name in self.registers:
                row = self.registers[operand.name]
            elif operand.name in self.special:
                row = self.special[operand.name]
            else:
                raise PtxError(f"unknown register {operand.name}")
            if row.dtype == np.bool_ or wanted == np.bool_:
                return row
            if row.dtype.itemsize < wanted.itemsize:
                raise PtxError(f"{operand.name} is narrower than the {wanted} it is read as")
            low: Array = row.view(wanted)[:: row.dtype.itemsize // wanted.itemsize]
            return low
        if isinstance(operand, Immediate):
            return np.full(self.threads, _pattern(operand, bits), UNSIGNED[bits] if bits > 1 else np.bool_).view(wanted)
        if isinstance(operand, Symbol):
            return np.full(self.threads, self.address_of(operand.name), UNSIGNED[bits]).view(wanted)
        raise PtxError(f"operand {operand} where a value is needed")

    def address_of(self, symbol: str) -> int:
        if symbol in self.program.dynamic:
            return self.shared_base
        if symbol in self.program.shared:
            return self.program.shared[symbol]
        if symbol in self.program.local:
            return self.program.local[symbol]
        if symbol in self.memory.buffers:
            return self.memory.buffers[symbol].start
        raise PtxError(f"unknown symbol {symbol}")

    def sink(self, operand: Operand, kind: str) -> Callable[[Array, Mask], None]:
        """What writes values of type ``kind`` into a register, extending by its sign where the register is wider."""
        if not isinstance(operand, Register):
            raise PtxError(f"operand {operand} where a register is needed")
        if operand.name == "_":
            return lambda values, mask: None
        row = self.registers[operand.name]
        if row.dtype == np.bool_:
            return lambda values, mask: np.copyto(row, values, where=mask)
        narrow = dtype(kind, WIDTHS[kind])
        if narrow.itemsize == row.dtype.itemsize:
            same = row.view(narrow)
            return lambda values, mask: np.copyto(same, values, where=mask, casting="unsafe")
        wide = row.view(f"i{row.dtype.itemsize}") if kind[0] == "s" else row
        plain = narrow if kind[0] in "us" else np.dtype(UNSIGNED[narrow.itemsize * 8])

        def extend(values: Array, mask: Mask) -> None:
            np.copyto(wide, values.astype(narrow, copy=False).view(plain), where=mask, casting="unsafe")

        return extend

    def components(self, operand: Operand) -> tuple[Operand, ...]:
        return operand.items if isinstance(operand, Vector) else (operand,)

    def active(self, mask: Mask) -> Array:
        """Indices of the lanes that ``mask`` selects."""
        return self.lanes if mask is True else np.flatnonzero(mask)

    def argument_names(self, address: Operand) -> set[str]:
        """The arguments an address may belong to, by what it is computed from; empty: unknown."""
        found: set[str] = set()
        for name in registers(address):
            found |= {self.pointers.get(root, root) for root in self.roots.get(name, ())}
        return found

    def atomic_arguments(self) -> set[str]:
        """The arguments that atomic instructions update."""
        found: set[str] = set()
        for each in self.program.instructions:
            if each.parts[0] in ("atom", "red") and ".shared" not in each.opcode:
                found |= self.argument_names(each.operands[each.parts[0] == "atom"])
        return found

    # ------------------------------------------------------------------ decoding

    def _decode(self) -> list[Block]:
        code = self.program.instructions
        labels = self.program.labels
        targets = {labels[i.operands[0].name] for i in code if _branches(i) and isinstance(i.operands[0], Symbol)}
        starts = sorted({0} | targets | {n + 1 for n, i in enumerate(code[:-1]) if _branches(i) or _leaves(i)})
        index = {start: number for number, start in enumerate(starts)}
        loaded = _loaded_registers(code)
        blocks = []
        for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
            block = Block()
            for each in code[start:end]:
                block.opcodes.append(each.opcode)
                if _branches(each) or _leaves(each):
                    block.exit = each
                    block.predicate = self.registers[each.guard] if each.guard else None
                    if _branches(each) and isinstance(each.operands[0], Symbol):
                        block.target = index[labels[each.operands[0].name]]
                else:
                    block.steps.append(self._step(each, loaded))
            blocks.append(block)
        return blocks

    def _step(self, each: Instruction, loaded: set[str]) -> Step:
        builder = BUILDERS.get(each.parts[0])
        try:
            step = builder(self, each) if builder else _unimplemented(each)
        except (PtxError, KeyError, IndexError, AttributeError) as error:
            step = _unimplemented(each, error)
        reads = [name for operand in each.operands[1:] for name in registers(operand)]
        if each.opcode.startswith(("st", "red", "cp")):
            reads += registers(each.operands[0]) if each.operands else []
        waits = [name for name in reads if name in loaded]
        if waits:
            moves = each.parts[0] == "mov"
            step = _aliasing(self.in_flight, step, registers(each.operands[0]), waits) if moves else step
            step = step if moves else _consuming(self.in_flight, step, waits)
        return self._guarded(each, step) if each.guard else step

    def _guarded(self, each: Instruction, step: Step) -> Step:
        predicate, unless = self.registers[each.guard or ""], each.unless

        def guarded(mask: Mask) -> None:
            chosen = ~predicate if unless else predicate
            if mask is not True:
                chosen = chosen & mask
            if chosen.all():
                step(True)
            elif chosen.any():
                step(chosen if chosen is not predicate else chosen.copy())

        return guarded

    # ------------------------------------------------------------------ execution

    def run_cta(self, cta: tuple[int, int, int], weight: float = 1.0) -> None:
        """Execute one CTA, counted ``weight`` times. Raises PtxError on what must not happen."""
        for axis, position in zip("xyz", cta, strict=True):
            self.special[f"%ctaid.{axis}"][:] = position
        for file in self.files:
            file[:] = 0
        self.cta = self.memory.cta = cta
        self.shared.start_cta()
        self.in_flight.clear()
        with np.errstate(all="ignore"):
            self._run()
        self.memory.finish_cta(weight)
        self.statistics.executed += 1
        self.statistics.peaks.append((weight, self.in_flight.peak))

    def _run(self) -> None:
        self.waiting: dict[int, Mask] = {0: True}
        for _ in range(ENDLESS):
            if not self.waiting:
                return
            number = min(self.waiting)
            mask = self.waiting.pop(number)
            if mask is not True and not self.waiting and np.all(mask):
                mask = True
            block = self.blocks[number]
            block.executed += self.warps if mask is True else len(np.unique(self.warp_of[mask]))
            for step in block.steps:
                step(mask)
            for target, group in self._leave(block, number, mask):
                before = self.waiting.get(target)
                self.waiting[target] = group if before is None else before | group
        raise PtxError(f"CTA {self.cta} executed {ENDLESS} blocks and does not end")

    def _leave(self, block: Block, number: int, mask: Mask) -> list[tuple[int, Mask]]:
        """Where the threads of ``mask`` go next; those that leave the kernel go nowhere."""
        if block.exit is None:
            return [(number + 1, mask)]
        leaving = _leaves(block.exit)
        if block.predicate is None:
            return [] if leaving else [(block.target, mask)]
        taken = ~block.predicate if block.exit.unless else block.predicate.copy()
        if mask is True and taken.all():
            return [] if leaving else [(block.target, mask)]
        if mask is not True:
            taken &= mask
        if not taken.any():
            return [(number + 1, mask)]
        stay = mask & ~taken
        groups: list[tuple[int, Mask]] = [] if leaving else [(block.target, taken)]
        return [*groups, (number + 1, stay)] if stay.any() else groups

    def count_instructions(self) -> None:
        """Add what the blocks executed since the last call to the statistics."""
        for block in self.blocks:
            for opcode in block.opcodes if block.executed else ():
                self.statistics.instructions[opcode] += block.executed
            block.executed = 0


def _branches(each: Instruction) -> bool:
    return each.parts[0] == "bra"


def _leaves(each: Instruction) -> bool:
    return each.parts[0] in ("ret", "exit")


def _unimplemented(each: Instruction, reason: Exception | None = None) -> Step:
    def refuse(mask: Mask) -> None:
        raise PtxError(f"not implemented: {each.where}" + (f": {reason}" if reason else "")) from reason

    return refuse


def _consuming(in_flight: InFlight, step: Step, names: list[str]) -> Step:
    def consume(mask: Mask) -> None:
        in_flight.consume(names)
        step(mask)

    return consume


def _aliasing(in_flight: InFlight, step: Step, names: list[str], sources: list[str]) -> Step:
    def alias(mask: Mask) -> None:
        in_flight.alias(names, sources)
        step(mask)

    return alias


def _loaded_registers(code: list[Instruction]) -> set[str]:
    """Registers that hold the result of a global load, directly or through moves."""
    found = {name for i in code if i.opcode.startswith("ld.global") for name in registers(i.operands[0])}
    moves = [i for i in code if i.parts[0] == "mov"]
    before = -1
    while len(found) != before:
        before = len(found)
        for move in moves:
            if found.intersection(registers(move.operands[1])):
                found.update(registers(move.operands[0]))
    return found


def _granule(program: Program) -> int:
    """Bytes of the smallest access to shared memory, at most a 16-byte vector."""
    sizes = [16]
    for each in program.instructions:
        if ".shared" in each.opcode and each.parts[0] in ("ld", "st", "atom", "red"):
            vector = next((int(part[1:]) for part in each.parts if part in ("v2", "v4", "v8")), 1)
            sizes.append(vector * WIDTHS[each.parts[-1]] // 8)
        elif each.opcode.startswith("cp.async") and ".shared" in each.opcode and len(each.operands) > 2:
            size = each.operands[2]
            sizes.append(size.bits if isinstance(size, Immediate) else 4)
    return min(sizes)


def _pattern(operand: Immediate, bits: int) -> int:
    if bits == 1:
        return int(operand.bits != 0)
    return operand.bits & ((1 << bits) - 1)
