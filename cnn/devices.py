"""Where a network runs. A device prepares ops into Steps, owns memory and runs a list of Steps."""
from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from kernels.ops import Op, TensorSpec
from kernels.step import Array, Options, Run, Step

from .errors import DeviceError

logger = logging.getLogger("cnn")
ALIGNMENT = 64      # bytes: a cache line, and the widest vector


class CpuDevice:
    """Hand-written numba.njit kernels on NumPy memory, float32."""
    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        """DeviceError where that many threads can not be had; None asks for all there are."""
        from kernels.cpu import threads as cpu_threads  # numba is imported only when asked for
        try:
            self.threads = cpu_threads.check_threads(threads)
        except ValueError as error:
            raise DeviceError(str(error)) from None
        self._team = cpu_threads.team

    def prepare(self, op: Op, inputs: list[TensorSpec], output: TensorSpec,
                weights: list[Array | None], options: Options) -> Step:
        """Choose the kernel for an op of these shapes; `weights` holds the constant inputs."""
        from kernels.cpu.backend import prepare
        return prepare(op, inputs, output, weights, options)

    def allocate(self, size: int) -> Array:
        """`size` bytes, aligned and zeroed."""
        block = np.zeros(size + ALIGNMENT, np.uint8)
        start = -block.ctypes.data % ALIGNMENT
        return block[start:start + size]

    def run(self, steps: Sequence[Run]) -> None:
        """Run bound steps in order. DeviceError in a child that was forked after kernels ran."""
        try:
            with self._team(self.threads):
                for step in steps:
                    step()
        except RuntimeError as error:
            raise DeviceError(str(error)) from None


def open_device(device: str, dtype: str, threads: int | None) -> CpuDevice:
    """The device that a name asks for; DeviceError where it can not be had.

    device: "cpu", "cuda", "cuda:N" or "auto"; dtype: "float32", the compute type.
    """
    if not isinstance(device, str) or (device not in ("auto", "cpu", "cuda")
                                       and not device.startswith("cuda:")):
        raise DeviceError(f"device={device!r} is unknown; it can be 'auto', 'cpu', 'cuda' or "
                          f"'cuda:N'")
    if dtype != "float32":
        raise DeviceError(f"dtype={dtype!r} is not supported on the CPU; it can be 'float32'")
    if device.startswith("cuda"):
        raise DeviceError(f"device={device!r}: this version has no CUDA backend; use "
                          f"device='cpu' or 'auto'")
    if device == "auto":
        logger.info("device 'auto' is the CPU: this version has no CUDA backend")
    return CpuDevice(threads)
