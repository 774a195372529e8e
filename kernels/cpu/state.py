"""What threads share: STATE, an array of words that machine code knows by its address.

Words that are written while others wait for them have a line of their own. See parallel.py.
"""
from __future__ import annotations

import numpy as np

MOST_THREADS = 1024
LINE = 16       # words: two cache lines, for processors fetch them in pairs

GATE = 0                # who may come in: number of the job * JOB | OPEN | workers inside
BUSY = LINE             # 1 while a job is prepared or runs
CALLS = 2 * LINE        # calls of networks that are being answered
FUNCTION, ARGUMENTS, THREADS = (3 * LINE + i for i in range(3))
SHARES = 4 * LINE       # + thread * LINE: next unit of its share; the word after it: end
JOB, OPEN, INSIDE = 1 << 17, 1 << 16, (1 << 16) - 1

STATE = np.zeros(SHARES + MOST_THREADS * LINE, np.int64)
SYMBOL = "cnn_threads_state"     # its name in machine code


def make_known() -> None:
    """Tell LLVM, whoever loads machine code by it, where STATE is."""
    import llvmlite.binding as llvm  # not needed before, and slow to import
    llvm.add_symbol(SYMBOL, STATE.ctypes.data)
