"""PTX text -> Module (PTX ISA 4: syntax, 5: state spaces and types, 6: operands)."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import numpy as np

from .errors import ParseError
from .instruction import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Module,
    Negated,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)
from .ptxtypes import U8, U32, U64, UINT, bits

_BLANKED = re.compile(r"//[^\n]*|/\*.*?\*/|(?m:^\s*\.(?:loc|file)\b[^\n]*)", re.S)
_TOP = re.compile(
    r"""\s*(?: \.(?:version|target|address_size)[^\n]*
             | (?:\.(?:visible|extern|weak|common)\s+)*\.(?P<function>entry|func)\b
             | (?P<variable>[^;{]*(?:\{[^}]*\})?[^;{]*);
    )""",
    re.X,
)
_FUNCTION = re.compile(
    r"\s*(?:\([^)]*\)\s*)?(?P<name>[\w$]+)\s*(?:\((?P<parameters>[^)]*)\))?[^{;]*(?P<end>[{;])"
)
_STATEMENT = re.compile(
    r"""\s*(?: (?P<brace>[{}])
             | (?P<label>[\w$]+)\s*:(?!:)
             | (?P<statement>[^;{}]+(?:\{[^}]*\}[^;{}]*)*);
    )""",
    re.X,
)
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", re.S)
_COMMAS = re.compile(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+")
_NAME = re.compile(r"[%\w$.:]+")
_SPECIAL = re.compile(  # PTX ISA 10
    r"%(n?(tid|ctaid|clusterid|warpid|smid)|gridid|is_explicit_cluster|laneid|lanemask|clock|pm\d"
    r"|envreg|globaltimer|cluster_|reserved_|total_|aggr_|dynamic_|current_)[\w.]*"
)
_BASE_OFFSET = re.compile(r"([%\w$.]+)(?:\s*\+\s*(-?\w+))?")


@lru_cache(maxsize=64)
def parse(text: str) -> Module:
    """Parse a PTX text; the result is shared by all who pass the same text, and never changed."""
    text = _BLANKED.sub(lambda m: "\n" * m.group().count("\n"), text)  # line numbers stay
    kernels: dict[str, Kernel] = {}
    variables: list[Variable] = []
    position = 0
    while top := _TOP.match(text, position):
        position = top.end()
        if top["function"]:
            head = _FUNCTION.match(text, position)
            if head is None:
                raise ParseError(_near(text, position))
            position = head.end()
            if head["end"] == ";":
                continue
            end = _closing_brace(text, position)
            if top["function"] == "entry":
                line = 1 + text.count("\n", 0, position)
                body = text[position : end - 1]
                kernels[head["name"]] = _Body(head["name"], head["parameters"] or "", line).read(
                    body
                )
            position = end
        elif top["variable"] and re.search(r"\.(global|const|shared)\b", top["variable"]):
            variables.append(_variable(top["variable"]))
    if text[position:].strip():
        raise ParseError(_near(text, position))
    return Module(kernels, variables)


def _near(text: str, position: int) -> str:
    line = 1 + text.count("\n", 0, position)
    snippet = " ".join(text[position : position + 80].split())
    return f"The PTX text cannot be read near line {line}: {snippet!r}."


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return start + brace.end()
    raise ParseError("The PTX text ends inside a function: a closing brace is missing.")


def _variable(declaration: str) -> Variable:
    """`.shared .align 4 .b8 name[4096]`, perhaps with ` = {1, 2}`"""
    head, _, initial = declaration.partition("=")
    space = re.search(r"\.(global|const|shared|local|param)\b", head)
    types = re.findall(r"\.([usbf]\d+)\b", head)
    name = re.search(r"([\w$]+)((?:\s*\[[^\]]*\])*)\s*$", head.strip())
    if space is None or not types or name is None:
        raise ParseError(f"The declaration {' '.join(declaration.split())!r} cannot be read.")
    element = bits(types[-1]) // 8
    size = element
    for extent in re.findall(r"\[\s*(\w*)\s*\]", name[2]):
        size *= int(extent, 0) if extent else 0
    align = re.search(r"\.align\s+(\d+)", head)
    return Variable(
        space[1],
        name[1],
        max(element, int(align[1]) if align else 1),
        size,
        types[-1],
        _initial_bytes(initial, types[-1], element) if initial.strip() else None,
    )


def _initial_bytes(text: str, type_name: str, element: int) -> Any:
    try:
        values = [_number(v) for v in re.findall(r"-?[\w.]+", text)]
    except ValueError:
        raise ParseError(
            f"The initial value {' '.join(text.split())[:80]!r} is not made of numbers."
        ) from None
    if type_name[0] == "f":
        return np.array(values, f"f{element}").view(U8)
    return np.array([v % (1 << 8 * element) for v in values], UINT[element]).view(U8)


def _number(text: str) -> Any:
    """PTX ISA 4.5: 0x, 0b, octal and decimal integers, 0f and 0d floating-point bit patterns."""
    if text[:2] in ("0f", "0F"):
        return np.array([int(text[2:], 16)], U32).view(np.float32)[0]
    if text[:2] in ("0d", "0D"):
        return np.array([int(text[2:], 16)], U64).view(np.float64)[0]
    text = text.rstrip("U")
    if "." in text:
        return np.float64(text)
    return int(text, 8) if re.fullmatch(r"-?0\d+", text) else int(text, 0)


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets and braces."""
    return [part for part in _COMMAS.findall(text) if part.strip()]


class _Scope:
    """A block in braces: its registers (name -> width, whether it is a range) and labels."""

    def __init__(self) -> None:
        self.registers: dict[str, tuple[int, bool]] = {}
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}  # .branchtargets


class _Body:
    """Reads one .entry."""

    def __init__(self, name: str, parameters: str, line: int) -> None:
        self.kernel = Kernel(name, [_variable(p) for p in parameters.split(",") if p.strip()])
        self.line = line
        self.scopes = [_Scope()]
        self.rows: dict[int, dict[tuple[str, int], int]] = {1: {}, 16: {}, 32: {}, 64: {}}
        self.branches: list[tuple[Instruction, list[_Scope]]] = []
        self.kept: list[_Scope] = []  # every scope, so that id() stays unique

    def read(self, text: str) -> Kernel:
        position, label = 0, ""
        for m in _STATEMENT.finditer(text):
            if text[position : m.start()].strip():
                break
            self.line += text.count("\n", position, m.start(m.lastgroup or 0))
            position = m.start(m.lastgroup or 0)
            if m["brace"] == "{":
                self.scopes.append(_Scope())
            elif m["brace"]:
                self.kept.append(self.scopes.pop())
            elif m["label"]:
                label = m["label"]
                self.scopes[-1].labels[label] = len(self.kernel.instructions)
            else:
                self.statement(m["statement"].strip(), label)
            self.line += text.count("\n", position, m.end())
            position = m.end()
        if text[position:].strip():
            raise self.error(f"cannot be read: {text[position:].split(';')[0].strip()[:80]!r}")
        for instruction, scopes in self.branches:
            self.resolve(instruction, scopes)
        self.kernel.registers = {width: len(rows) for width, rows in self.rows.items()}
        return self.kernel

    def error(self, what: str) -> ParseError:
        name = self.kernel.name
        return ParseError(
            f"Kernel {name!r}, PTX line {self.line}, {what}.", kernel=name, line=self.line
        )

    def statement(self, text: str, label: str) -> None:
        if text.startswith(".reg"):
            self.declare(text)
        elif re.match(r"\.(local|shared|global|const)\b", text):
            self.kernel.variables.append(_variable(text))
        elif text.startswith(".branchtargets"):
            targets = text.removeprefix(".branchtargets").split(",")
            self.scopes[-1].tables[label] = [target.strip() for target in targets]
        elif not text.startswith("."):  # .pragma, .param of a call and the like
            self.instruction(text)

    def declare(self, text: str) -> None:
        """`.reg .b32 %r<100>` or `.reg .pred p, q`"""
        declaration = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
        if declaration is None:
            raise self.error(f"has a declaration that cannot be read: {text[:80]!r}")
        width = 1 if declaration[1] == "pred" else max(16, bits(declaration[1]))
        for entry in declaration[2].split(","):
            name, _, count = entry.strip().partition("<")
            self.scopes[-1].registers[name] = (width, bool(count))

    def instruction(self, text: str) -> None:
        parts = _INSTRUCTION.match(text)
        if parts is None:
            raise self.error(f"has a statement that cannot be read: {text[:80]!r}")
        opcode, *modifiers = parts[3].split(".")
        if text.count("[") != text.count("]") or text.count("{") != text.count("}"):
            raise self.error(f"has a bracket without its other half: {text[:80]!r}")
        arguments = "" if opcode == "call" else parts[4]  # not executed, and with its own syntax
        predicate = None
        try:
            operands = tuple(self.operand(p) for p in _split(arguments))
            if parts[2]:
                predicate = self.operand(parts[2])
        except (ValueError, TypeError, AttributeError) as error:
            raise self.error(f"has operands that cannot be read: {text[:80]!r} ({error})") from None
        if predicate is not None and not isinstance(predicate, Register):
            raise self.error(f"has a predicate that is not declared: {text[:80]!r}")
        instruction = Instruction(
            opcode,
            tuple(modifiers),
            operands,
            " ".join(text.split()),
            self.line,
            predicate,
            parts[1] == "!",
        )
        self.kernel.instructions.append(instruction)
        if opcode in ("bra", "brx"):
            self.branches.append((instruction, list(self.scopes)))

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if text[0] == "[":
            first, *rest = _split(text[1:-1])
            match = _BASE_OFFSET.fullmatch(first.strip())
            if match is None:
                raise ValueError(text)
            base = self.operand(match[1])
            return Address(base, int(match[2] or "0", 0), tuple(self.operand(r) for r in rest))
        if text[0] == "{":
            return Vector(tuple(self.operand(p) for p in _split(text[1:-1])))
        if text == "_":
            return Sink()
        if text[0] == "!":
            return Negated(self.operand(text[1:]))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first), self.operand(second))
        if re.match(r"-?[\d.]", text):
            return Immediate(_number(text))
        if not _NAME.fullmatch(text):
            raise ValueError(text)
        register = self.register(text)
        if register is None and text[0] == "%" and not _SPECIAL.fullmatch(text):
            raise ValueError(f"{text} is not declared")
        return register or (Special(text) if text[0] == "%" else Symbol(text))

    def register(self, name: str) -> Register | None:
        stem = name.rstrip("0123456789")
        for scope in reversed(self.scopes):
            width, _ = scope.registers.get(name, (0, False))
            if not width:
                width, is_range = scope.registers.get(stem, (0, False))
                width = width if is_range else 0
            if width:
                rows = self.rows[width]
                return Register(width, rows.setdefault((name, id(scope)), len(rows)))
        return None

    def resolve(self, instruction: Instruction, scopes: list[_Scope]) -> None:
        """Labels of a branch, looked up from the innermost scope outward."""
        operand = instruction.operands[-1]
        names = [operand.name if isinstance(operand, Symbol) else str(operand)]
        if instruction.opcode == "brx":
            names = next((s.tables[names[0]] for s in reversed(scopes) if names[0] in s.tables), [])
        targets = [
            next((s.labels[n] for s in reversed(scopes) if n in s.labels), -1) for n in names
        ]
        if not targets or -1 in targets:
            self.line = instruction.line
            raise self.error(f"branches to an unknown label: {instruction.text!r}")
        instruction.targets = tuple(targets)
