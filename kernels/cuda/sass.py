"""Reads machine code: which instructions a cubin holds, and which its loops do."""
from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from .assembler import find_tool
from .errors import CompilerMissing

SUFFIXES = re.compile(r"\.(CONSTANT|SYS)\b")        # of loads; sm_75 has the second on all
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?\w+\s+)?[A-Z][^;]*);")
LABEL = re.compile(r"\s*(\.L_x_\d+):")


class Instruction(NamedTuple):
    address: int
    opcode: str         # with its modifiers but SUFFIXES: "LDG.E.128"
    target: str         # label that a branch goes to, or ""


class Loop(NamedTuple):
    """Addresses of a backward branch's target and of the branch."""
    start: int
    end: int


def disassemble(cubin: bytes) -> str:
    """SASS of a cubin. CompilerMissing without nvdisasm."""
    tool = find_tool("nvdisasm")
    if tool is None:
        raise CompilerMissing("machine code is read by nvdisasm, which is not installed here: "
                              "pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([tool, "-c", path], capture_output=True, text=True,
                              check=True).stdout


def instructions(sass: str) -> list[Instruction]:
    """All but the padding that is never executed ("@!PT")."""
    found = []
    for address, text in INSTRUCTION.findall(sass):
        if text.startswith("@!PT "):
            continue
        text = re.sub(r"^@\S+\s+", "", text)
        target = re.search(r"`\((\.L_x_\d+)\)", text)
        found.append(Instruction(int(address, 16), SUFFIXES.sub("", text.split()[0]),
                                 target.group(1) if target else ""))
    return found


def opcodes(cubin: bytes) -> Counter[str]:
    """How often each opcode stands in a kernel; LDG.E.128.CONSTANT counts as LDG.E.128."""
    return Counter(instruction.opcode for instruction in instructions(disassemble(cubin)))


def labels(sass: str) -> dict[str, int]:
    """The address that each label stands for."""
    places: dict[str, int] = {}
    pending: list[str] = []
    for line in sass.splitlines():
        label, instruction = LABEL.match(line), INSTRUCTION.search(line)
        if label:
            pending.append(label.group(1))
        elif instruction:
            places.update((name, int(instruction.group(1), 16)) for name in pending)
            pending = []
    return places


def loops(sass: str) -> list[Loop]:
    """The range of each backward branch."""
    places = labels(sass)
    return sorted({Loop(places[i.target], i.address) for i in instructions(sass)
                   if i.opcode.startswith("BRA") and i.target and places[i.target] < i.address})


def common_path(sass: str, loop: Loop) -> list[Instruction]:
    """The loop's instructions without those that run only for a loop inside it: from the last
    branch before that, over it, to where the branch leads."""
    places = labels(sass)
    inside = [i for i in instructions(sass) if loop.start <= i.address <= loop.end]
    skipped = []
    for inner in loops(sass):
        over = [(i.address, places[i.target]) for i in inside
                if i.opcode.startswith("BRA") and i.target
                and i.address < inner.start and inner.end < places[i.target] <= loop.end]
        if inner != loop and loop.start <= inner.start and inner.end <= loop.end:
            skipped += over[-1:]
    return [i for i in inside if not any(start < i.address < end for start, end in skipped)]


def loop_opcodes(cubin: bytes, opcode: str) -> Counter[str]:
    """Opcodes on the common path of the loop that holds most of one, such as "HMMA"; of the
    smallest such loop."""
    sass = disassemble(cubin)
    found = [Counter(i.opcode for i in common_path(sass, loop)) for loop in loops(sass)]
    return max(found, key=lambda counts: (number(counts, opcode), -counts.total()),
               default=Counter())


def number(counts: Counter[str], opcode: str) -> int:
    """How many of an opcode there are, whatever its modifiers."""
    return sum(n for name, n in counts.items() if name.split(".")[0] == opcode)
