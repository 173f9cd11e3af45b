"""PTX text -> instructions: what Triton (LLVM's NVPTX backend and inline assembly) emits, one kernel per module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

WIDTHS = {
    "pred": 1,
    **{f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 16, "bf16": 16, "f32": 32, "tf32": 32, "f64": 64, "b128": 128},
    **{"e4m3x2": 16, "e5m2x2": 16, "e2m1x2": 8, "f16x2": 32, "bf16x2": 32, "f32x2": 64, "u16x2": 32, "s16x2": 32},
}  # bits of every type that an instruction may name


class PtxError(RuntimeError):
    """What the compiled code does wrong, or what this executor cannot do; names the instruction and source line."""


@dataclass(frozen=True, slots=True)
class Register:
    name: str  # "%r12"; special registers ("%tid.x") look the same and are told apart by the machine


@dataclass(frozen=True, slots=True)
class Immediate:
    bits: int  # two's complement, or the pattern of a float
    width: int = 64  # the width in which ``bits`` is written: 32 for 0f..., 64 for 0d... and integers


@dataclass(frozen=True, slots=True)
class Symbol:
    name: str  # a shared, local or constant array; a parameter; a label


@dataclass(frozen=True, slots=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Address:
    base: Operand
    offset: int


@dataclass(frozen=True, slots=True)
class Pair:
    """``d|p``: a value and a predicate (shfl, setp)."""

    first: Operand
    second: Operand


@dataclass(frozen=True, slots=True)
class Negated:
    """``!p``."""

    predicate: Register


Operand = Register | Immediate | Symbol | Vector | Address | Pair | Negated


@dataclass(frozen=True, slots=True)
class Instruction:
    opcode: str  # "ld.global.v4.b32"
    operands: tuple[Operand, ...]
    guard: str | None = None  # predicate register
    unless: bool = False  # the guard is negated
    line: str = "?"  # "moe.py:70:10"
    text: str = ""

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    @property
    def where(self) -> str:
        return f"{self.text} ({self.line})"


@dataclass(slots=True)
class Program:
    """One kernel."""

    name: str
    parameters: list[tuple[str, str]] = field(default_factory=list)  # (name, type) in order
    threads: int = 0
    registers: dict[str, int] = field(default_factory=dict)  # name -> bits
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # label -> index of the instruction after it
    constants: dict[str, bytes] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # arrays of known size -> offset
    dynamic: set[str] = field(default_factory=set)  # names of the extern array, whose size the launch decides
    local: dict[str, int] = field(default_factory=dict)  # per-thread arrays -> offset
    local_bytes: int = 0
    shared_bytes: int = 0


def parse(ptx: str) -> Program:
    """The kernel of a PTX module. Raises PtxError where the text is not understood."""
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", ptx, re.DOTALL)
    if head is None:
        raise PtxError("no .entry in the PTX")
    program = Program(head[1])
    program.parameters = [
        (name, kind) for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?([\w$]+)\s*(?:,|$)", head[2])
    ]
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
    program.threads = int(threads[1]) if threads else 0
    for name, values in re.findall(r"\.global\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\d*\]\s*=\s*\{([^}]*)\}", ptx):
        program.constants[name] = bytes(int(value) & 255 for value in values.split(","))
    for name in re.findall(r"\.extern\s+\.shared\s+[^;]*?([\w$]+)\[\]\s*;", ptx):
        program.dynamic.add(name)
    _Body(program).read(ptx[head.end() :])
    return program


class _Body:
    """Reads the statements between the braces of the kernel, keeping track of scopes: inline assembly may declare
    registers and labels of its own, and the same names again in the next block."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.scopes: list[dict[str, str]] = [{}]
        self.opened = 0
        self.line = "?"

    def read(self, text: str) -> None:
        for statement, comment in _statements(text):
            if statement == "{":
                self.opened += 1
                self.scopes.append({})
            elif statement == "}":
                self.scopes.pop()
                if not self.scopes:
                    break
            elif statement.endswith(":"):
                self.program.labels[self._label(statement[:-1])] = len(self.program.instructions)
            elif statement.startswith(".loc "):
                self.line = comment.split(" @")[0].strip() or ":".join(statement.split()[1:4])
            elif statement.startswith("."):
                self._declare(statement)
            else:
                self._instruction(statement)
        self.program.instructions.append(Instruction("ret", (), line=self.line, text="end of kernel"))

    def _declare(self, statement: str) -> None:
        if found := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement):
            for name in re.split(r"\s*,\s*", found[2].strip()):
                several = re.fullmatch(r"(.+)<(\d+)>", name)
                names = [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name]
                for each in names:
                    self.program.registers[self._rename(each)] = WIDTHS[found[1]]
        elif found := re.match(r"\.(shared|local)\s+\.align\s+(\d+)\s+\.b(\d+)\s+([\w$]+)(?:\[(\d+)\])?", statement):
            space, align, bits, name, count = found[1], int(found[2]), int(found[3]), found[4], int(found[5] or 1)
            arrays, end = (
                (self.program.shared, self.program.shared_bytes)
                if space == "shared"
                else (self.program.local, self.program.local_bytes)
            )
            start = -(-end // align) * align
            arrays[name] = start
            if space == "shared":
                self.program.shared_bytes = start + count * bits // 8
            else:
                self.program.local_bytes = start + count * bits // 8

    def _rename(self, name: str) -> str:
        """Declare ``name`` in the innermost scope, under a name of its own if the scope is an inner one."""
        unique = name if len(self.scopes) == 1 else f"{name}@{self.opened}"
        self.scopes[-1][name] = unique
        return unique

    def _label(self, name: str) -> str:
        return name if name.startswith("$") or len(self.scopes) == 1 else f"{name}@{self.opened}"

    def _instruction(self, statement: str) -> None:
        guard, unless, text = None, False, statement
        if statement.startswith("@"):
            predicate, statement = statement[1:].split(None, 1)
            unless = predicate.startswith("!")
            guard = self._resolve(predicate.lstrip("!"))
        opcode, _, rest = statement.partition(" ")
        operands = tuple(self._operand(part) for part in _split(rest))
        if opcode.startswith("bra") and isinstance(operands[0], Symbol):
            operands = (Symbol(self._label(operands[0].name)),)
        self.program.instructions.append(Instruction(opcode, operands, guard, unless, self.line, text))

    def _resolve(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            base, _, offset = text[1:-1].replace(" ", "").replace("+-", "-").partition("+")
            if not offset and (found := re.fullmatch(r"(.+?)(-\d+)", base)):
                base, offset = found[1], found[2]
            return Address(self._operand(base), int(offset, 0) if offset else 0)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        if text.startswith("!"):
            return Negated(Register(self._resolve(text[1:].strip())))
        if text[:2] in ("0f", "0F"):
            return Immediate(int(text[2:], 16), 32)
        if text[:2] in ("0d", "0D"):
            return Immediate(int(text[2:], 16), 64)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        resolved = self._resolve(text)
        if resolved in self.program.registers or text.startswith("%") or text == "_":
            return Register(resolved)
        return Symbol(text)


def _statements(text: str) -> Iterator[tuple[str, str]]:
    """Statements without their semicolon, labels with their colon, and braces of scopes; each with its comment."""
    held, inline = "", False
    for line in text.splitlines():
        code, _, comment = line.partition("//")
        code = code.strip()
        if comment.strip() in ("begin inline asm", "end inline asm"):
            inline = "begin" in comment
        if code.startswith((".loc ", ".loc\t", ".file")):
            if not inline:  # LLVM counts lines of the assembly on from that of its call
                yield code.replace("\t", " "), comment
            continue
        held = f"{held} {code}".strip() if code else held
        while held:
            if held[0] in "{}":
                yield held[0], ""
                held = held[1:].strip()
            elif found := re.match(r"([\w$]+):(?!:)", held):
                yield found[0], ""
                held = held[found.end() :].strip()
            elif ";" in held:
                statement, held = (part.strip() for part in held.split(";", 1))
                if statement:
                    yield re.sub(r"\s+", " ", statement), comment
            else:
                break


def _split(text: str) -> list[str]:
    """Split at the commas that stand outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]] if text.strip() else []
