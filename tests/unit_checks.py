"""CPUs that are not there, for tests of which unit multiplies."""
import ctypes

import pytest

from kernels.cpu.host import unit_choice


class System:
    """A stand-in for the C library, whose system call gives `result`."""

    def __init__(self, result):
        self.result, self.calls = result, []

    def syscall(self, *arguments):
        self.calls.append(arguments)
        ctypes.set_errno(95)
        return self.result


@pytest.fixture
def cpu(monkeypatch):
    """cpu(missing, permitted) puts a CPU in place where units lack these features, by name."""
    def plan(missing, permitted=True):
        system = System(0 if permitted else -1)
        for variable in ("CNN_BF16", "CNN_INT8"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(unit_choice, "missing", lambda unit: missing.get(unit.name, []))
        monkeypatch.setattr(unit_choice, "CDLL", lambda *_, **__: system)
        unit_choice.permit_tiles.cache_clear()
        return system
    yield plan
    unit_choice.permit_tiles.cache_clear()
