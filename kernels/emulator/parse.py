"""PTX text -> Module (PTX ISA 4: syntax)."""

from __future__ import annotations

import re
from functools import lru_cache
from math import prod

from .body import Body
from .declarations import parameters, variable
from .errors import ParseError
from .geometry import three
from .instruction import Function, Kernel, Module, Variable
from .link import link

_BLANKED = re.compile(  # comments and debug information
    r"//[^\n]*|/\*.*?\*/|(?m:^\s*\.(?:loc|file)\b[^\n]*)|\.section\s[^{]*\{[^}]*\}", re.S
)
_TOP = re.compile(
    r"""\s*(?: \.(?:version|target|address_size)[^\n]*
             | (?:\.(?:visible|extern|weak|common)\s+)*\.(?P<function>entry|func)\b
             | (?P<variable>[^;{]*(?:\{[^}]*\})?[^;{]*);
    )""",
    re.X,
)
_FUNCTION = re.compile(
    r"""\s*(?:\((?P<results>[^)]*)\)\s*)?(?P<name>[\w$]+)
        \s*(?:\((?P<parameters>[^)]*)\))?(?P<directives>[^{;]*)(?P<end>[{;])""",
    re.X,
)


@lru_cache(maxsize=64)
def parse(text: str) -> Module:
    """Parse a PTX text; the result is shared by all who pass the same text, and never changed."""
    text = _BLANKED.sub(lambda m: "\n" * m.group().count("\n"), text)  # line numbers stay
    kernels: dict[str, Kernel] = {}
    functions: dict[str, Function] = {}
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
            body, line = text[position : end - 1], 1 + text.count("\n", 0, position)
            if top["function"] == "entry":
                kernel = Body(head["name"], parameters(head["parameters"]), line).read(body)
                kernel.most_threads = _most_threads(head["directives"])
                kernel.cluster = _cluster(head["directives"])
                kernels[kernel.name] = kernel
            else:
                function = _function(head, body, line)
                functions[function.body.name] = function
            position = end
        elif top["variable"] and re.search(r"\.(global|const|shared)\b", top["variable"]):
            variables.append(variable(top["variable"]))
    if text[position:].strip():
        raise ParseError(_near(text, position))
    for kernel in kernels.values():
        link(kernel, functions)
    return Module(kernels, variables)


def _function(head: re.Match[str], text: str, line: int) -> Function:
    results = parameters(head["results"])
    both = results + parameters(head["parameters"])
    body = Body(head["name"], both, line, private=True).read(text)
    return Function(body, body.parameters[: len(results)], body.parameters[len(results) :])


def _most_threads(directives: str) -> int:
    """What .maxntid or .reqntid allow in a block (PTX ISA 11.2)."""
    limit = re.search(r"\.(?:maxntid|reqntid)\s+([\d\s,]+)", directives)
    return prod(int(n) for n in limit[1].split(",")) if limit else 1024


def _cluster(directives: str) -> tuple[int, int, int] | None:
    """What .reqnctapercluster asks for (PTX ISA 11.7)."""
    asked = re.search(r"\.reqnctapercluster\s+([\d\s,]+)", directives)
    return three("cluster", [int(n) for n in asked[1].split(",")]) if asked else None


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
