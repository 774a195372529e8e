"""As much of CuPy as kernels/cuda/gpu.py uses, over NumPy memory; kernels run in the emulator.

What it can not show is whether a driver takes the calls: that `pytest -m gpu` does.
"""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from kernels.emulator import Emulator


class Error(RuntimeError):
    pass


class ndarray(np.ndarray):
    """An array "on a GPU", of the number that its `device` says."""
    index = 0

    @property
    def device(self):
        return Device(self.index)

    @property
    def __cuda_array_interface__(self):
        return self.__array_interface__

    def __array_finalize__(self, other):
        self.index = getattr(other, "index", 0)

    def set(self, host):
        self[...] = host


class Device:
    current = 0

    def __init__(self, index):
        self.id = index

    def __enter__(self):
        self.before, Device.current = Device.current, self.id

    def __exit__(self, *error):
        Device.current = self.before


class Function:
    """Launches go to the emulator, once a fault is planned for none of them."""

    def __init__(self, cupy, code, name):
        self.cupy, self.code, self.name, self.ptr = cupy, code, name, id(self)

    def __call__(self, grid, block, args, shared_mem=0):
        self.cupy.calls.append(SimpleNamespace(name=self.name, grid=grid, block=block, args=args,
                                               shared=shared_mem, device=Device.current))
        if self.cupy.launch_error:
            raise Error(self.cupy.launch_error)
        Emulator().launch(self.code.decode(), self.name, grid, block, args, shared_mem)


class FakeCupy:
    """Stands in for the module; its attributes plan what the machine is like."""
    ndarray = ndarray

    def __init__(self, driver=13000, capabilities=((9, 0),)):
        self.calls, self.attributes, self.launch_error, self.load_error = [], {}, "", ""
        runtime = SimpleNamespace(
            CUDARuntimeError=Error, driverGetVersion=lambda: driver,
            getDeviceCount=lambda: len(capabilities), getDevice=lambda: Device.current,
            getDeviceProperties=lambda i: {
                "name": b"Fake GPU", "major": capabilities[i][0], "minor": capabilities[i][1],
                "multiProcessorCount": 4})
        self.cuda = SimpleNamespace(
            runtime=runtime, Device=Device, function=SimpleNamespace(Module=self.module),
            driver=SimpleNamespace(CUDADriverError=Error, funcSetAttribute=self.set_attribute))

    def module(self):
        def load(code):
            if self.load_error:
                raise Error(self.load_error)
            loaded.code = code
        loaded = SimpleNamespace(load=load)
        loaded.get_function = lambda name: Function(self, loaded.code, name)
        return loaded

    def set_attribute(self, pointer, attribute, value):
        self.attributes[attribute] = value

    def asarray(self, array):
        memory = np.array(array.memory if hasattr(array, "memory") else array, copy=None)
        found = memory.view(ndarray)
        found.index = Device.current
        return found

    from_dlpack = asarray

    def empty(self, shape, dtype):
        return self.asarray(np.full(shape, 0xFF, np.uint8) if dtype == np.uint8
                            else np.full(shape, np.nan, dtype))

    def asnumpy(self, array):
        return np.asarray(array).copy()
