"""Where tests of CUDA kernels run, and for which architectures they are compiled."""
from functools import cache

import pytest


@cache
def gpu_reason() -> str:
    """Why no GPU can be used here, or ""."""
    try:
        import cupy
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"no GPU: {error}"
    return ""


def pytest_runtest_setup(item):
    """A test marked `gpu` is skipped where there is none."""
    if item.get_closest_marker("gpu") and (reason := gpu_reason()):
        pytest.skip(reason)


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def runner(request):
    """What executes a kernel."""
    return request.param


@pytest.fixture(params=["sm_80", "sm_90a", *(pytest.param(arch, marks=pytest.mark.slow)
                                             for arch in ("sm_75", "sm_86", "sm_89"))])
def arch(request):
    """An architecture to assemble for."""
    return request.param
