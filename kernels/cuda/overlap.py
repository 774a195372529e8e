"""Kernels that begin before the one before them has ended: programmatic dependent launch, sm_90 on.

In a CUDA graph a kernel's blocks may come to a multiprocessor as soon as all blocks of the kernel
before it have said `launch_dependents`, or have ended. Its `wait` then takes until all of that
kernel's results are in memory; what comes before the wait overlaps with that kernel's end. So
before its `wait` a kernel must touch nothing but its constants. (CUDA C++ Programming Guide,
"Programmatic Dependent Launch"; PTX ISA, griddepcontrol.)

PTX is made for the least architecture that a kernel needs, which has no such instructions: there
they stand as comments, and `hopper` turns them into instructions where the PTX is assembled for a
GPU that has them.
"""
from __future__ import annotations

import re

WAIT = "// griddepcontrol.wait;"
LAUNCH_DEPENDENTS = "// griddepcontrol.launch_dependents;"
LEAST = 90      # sm_90

# Inline PTX has several instructions in a line.
_MEMORY = re.compile(r"[^/]*\b(ld|st|atom|red|cp|prefetch)\.(?!param)")
_BRANCH = re.compile(r"\s*(\$\w+:|(@!?%p\d+\s+)?(bra|ret|exit|bar)\b)")


def complete(text: str) -> str:
    """PTX whose kernel waits: if it does not say itself where, before it touches memory or branches
    for the first time, and whatever comes after it may begin."""
    if WAIT in text:
        return text
    head, brace, body = text.partition("\n{\n")
    lines = body.split("\n")
    place = next(i for i, line in enumerate(lines) if _MEMORY.match(line) or _BRANCH.match(line))
    lines[place:place] = [f"\t{WAIT}", f"\t{LAUNCH_DEPENDENTS}"]
    return head + brace + "\n".join(lines)


def hopper(text: str) -> str:
    """PTX whose comments have become instructions, which raises what it needs to sm_90."""
    text = re.sub(r"^\.target sm_[78]\d$", f".target sm_{LEAST}", text, flags=re.M)
    return re.sub(r"// (griddepcontrol\.\w+;)", r"\1", text)
