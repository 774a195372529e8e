"""prepare(...) for the CPU: which file's kernel runs which op."""
from __future__ import annotations

from collections.abc import Callable

from .. import ops
from ..ops import Op, TensorSpec
from ..step import Array, Options, Step
from . import conv, copy, elementwise, matmul, norm, pool, softmax

Prepare = Callable[..., Step]
