"""What several files of tests need: runners, architectures, a stand-in GPU, the command line."""
import os
import sys
from functools import cache

import networks
import onnx
import pytest
from fake_cupy import FakeCupy
from hypothesis import settings
from unit_checks import cpu  # noqa: F401

from cnn import cli

# Everybody draws the same examples, lest a change be refused for a case that others did not see.
# HYPOTHESIS_PROFILE=search draws new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("search")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@cache
def gpu_reason() -> str:
    """Why no GPU can be used here, or ""."""
    try:
        import cupy
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"no GPU: {error}"
    return ""


def pytest_configure(config):
    """Tests that ask for no GPU see none, for device "auto" is one wherever there is one."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item):
    """A test marked `gpu` is skipped where there is none."""
    if item.get_closest_marker("gpu") and (reason := gpu_reason()):
        pytest.skip(reason)


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def runner(request):
    """What executes a kernel."""
    return request.param


@pytest.fixture(params=["sm_90a", *(pytest.param(arch, marks=pytest.mark.slow)
                                    for arch in ("sm_75", "sm_80", "sm_86", "sm_89"))])
def arch(request):
    """An architecture to assemble for."""
    return request.param


@pytest.fixture
def small_model(tmp_path):
    """The file of a network that needs few kernels: conv, avgpool, logits."""
    net = networks.Builder(0, 16)
    x = net.relu(net.conv("input", "conv", 8, 3, stride=2))
    net.linear(net.global_pool(x), "head", 10)
    onnx.save(net.model("small"), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


@pytest.fixture
def machine(monkeypatch):
    """Function (driver=, capabilities=) that puts a machine with such GPUs in place."""
    from kernels.cuda import gpu  # imports the compiler, which other tests need not
    from kernels.cuda.compiler import ptx

    def clear():
        for cached in (gpu.gpu, gpu.load, real):
            cached.cache_clear()
        gpu._lost.clear()

    def plan(**options):
        fake = FakeCupy(**options)
        clear()
        monkeypatch.setitem(sys.modules, "cupy", fake)
        monkeypatch.setattr(gpu, "cubin", lambda kernel, arch: ptx(kernel).encode())
        monkeypatch.setattr(
            gpu, "launch_with_attributes", lambda function, launch, args, early, index: function(
                launch.grid, (launch.kernel.threads, 1, 1), args,
                shared_mem=launch.kernel.shared_bytes, early=early, cluster=launch.cluster))
        return fake
    real = gpu.cupy
    yield plan
    clear()


@pytest.fixture
def cnn(monkeypatch, capsys):
    """cnn("classify", ...) -> (exit status, stdout, stderr)."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["cnn", *map(str, arguments)])
        monkeypatch.setattr(cli, "out", cli.Console(highlight=False, width=200))
        monkeypatch.setattr(cli, "err", cli.Console(stderr=True, highlight=False, width=200))
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
        printed = capsys.readouterr()
        return status, printed.out, printed.err
    return call
