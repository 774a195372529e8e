"""The statements between the braces of an entry or a function -> Kernel (PTX ISA 4.3, 6)."""

from __future__ import annotations

import re
from dataclasses import replace

from .declarations import number, variable
from .errors import ParseError
from .instruction import (
    Address,
    Immediate,
    Instruction,
    Kernel,
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
from .ptxtypes import bits

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
_CALL = re.compile(
    r"(?:\((?P<results>[^)]*)\)\s*,)?\s*(?P<name>[%\w$]+)\s*(?:,\s*\((?P<parameters>[^)]*)\))?.*",
    re.S,
)


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets and braces."""
    return [part for part in _COMMAS.findall(text) if part.strip()]


class _Scope:
    """A block in braces: its registers (name -> width, whether it is a range) and labels."""

    def __init__(self) -> None:
        self.registers: dict[str, tuple[int, bool]] = {}
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}  # .branchtargets
        self.parameters: dict[str, str] = {}  # name -> a name that no other scope has


class Body:
    """Reads one .entry or .func.

    Parameters of a call are memory of the calling thread; so are, with `private`, those of the
    body itself, which is then a function.
    """

    def __init__(
        self, name: str, parameters: list[Variable], line: int, private: bool = False
    ) -> None:
        self.kernel = Kernel(name, parameters)
        self.line = line
        self.scopes = [_Scope()]
        self.kept: list[_Scope] = []  # every scope, so that id() stays unique
        self.branches: list[tuple[Instruction, list[_Scope]]] = []
        if private:
            self.kernel.parameters = [self.private(p) for p in parameters]
        self.rows: dict[int, dict[tuple[str, int], int]] = {1: {}, 16: {}, 32: {}, 64: {}}

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
            self.kernel.variables.append(variable(text))
        elif text.startswith(".branchtargets"):
            targets = text.removeprefix(".branchtargets").split(",")
            self.scopes[-1].tables[label] = [target.strip() for target in targets]
        elif text.startswith(".param"):
            self.private(variable(text))
        elif not text.startswith("."):  # .pragma and the like
            self.instruction(text)

    def private(self, parameter: Variable) -> Variable:
        """A parameter of a function or call becomes a local variable with a name of its own."""
        name = f"{self.kernel.name}.{len(self.kernel.variables)}.{parameter.name}"
        self.scopes[-1].parameters[parameter.name] = name
        self.kernel.variables.append(replace(parameter, space="local", name=name))
        return self.kernel.variables[-1]

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
        predicate = None
        try:
            operands = self.operands(opcode, parts[4])
            if parts[2]:
                predicate = self.operand(parts[2])
        except (ValueError, TypeError, IndexError, AttributeError) as error:
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
        elif opcode == "call":  # what happens when the function is done is a step of its own
            self.kernel.instructions.append(replace(instruction, opcode="call-done"))

    def operands(self, opcode: str, text: str) -> tuple[Operand, ...]:
        """Of a call: results, function, parameters."""
        if opcode != "call":
            return tuple(self.operand(p) for p in _split(text))
        call = _CALL.match(text)
        if call is None:
            raise ValueError(text)
        results, parameters = (
            Vector(tuple(self.operand(p) for p in _split(call[part] or "")))
            for part in ("results", "parameters")
        )
        return results, Symbol(call["name"]), parameters

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
            return Immediate(number(text))
        if not _NAME.fullmatch(text):
            raise ValueError(text)
        for scope in reversed(self.scopes):
            if text in scope.parameters:
                return Symbol(scope.parameters[text])
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
                rows = self.rows.setdefault(width, {})  # 128 is for Machine.decode to refuse
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
