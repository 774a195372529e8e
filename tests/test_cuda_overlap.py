"""Kernels that begin before the one before them has ended: what their PTX and machine code say.

That none touches too early what another may still use is checked wherever a kernel runs in the
emulator (cuda_checks.execute).
"""
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from kernels.cuda import gpu, overlap
from kernels.cuda.compiler import cubin, ptx
from kernels.cuda.conv_gemm import WHOLE
from kernels.cuda.emulate import emulate
from kernels.cuda.errors import CudaError
from kernels.cuda.host.conv import conv_kernel
from kernels.cuda.host.conv_choice import MMA_TILES, WGMMA_TILES
from kernels.cuda.host.elementwise import flat_kernel, prepare_unary
from kernels.cuda.launch import CudaOptions, Launch
from kernels.cuda.sass import opcodes
from kernels.emulator import TooEarly
from kernels.ops import Relu, TensorSpec

TEXT = """.version 9.0
.target {target}

.visible .entry k(
\t.param .u64 k_param_0
)
{{
\t.reg .b64 \t%rd<3>;

\tld.param.u64 \t%rd1, [k_param_0];
{rest}
\tret;

}}
"""
ADD = "\tmov.u32 \t%r1, %tid.x;"
CONV = conv_kernel("float16", MMA_TILES[-1], "clip", WHOLE)


def text(*rest, target="sm_75"):
    return TEXT.format(target=target, rest="\n".join(rest))


@pytest.mark.parametrize("first", [
    "\tld.global.u32 \t%r2, [%rd1];", "\t@%p1 st.global.u32 \t[%rd1], %r1;", "$L__BB0_1:",
    "\t{ .reg .b32 w; @p ld.global.b32 w, [%rd1]; mov.b32 %r2, w; }", "\t@%p1 bra \t$L__BB0_2;",
    "\tbar.sync \t0;", "\tcp.async.cg.shared.global [%r1], [%rd1], 16;"])
def test_a_kernel_that_does_not_say_so_waits_before_memory_or_a_branch(first):
    found = overlap.complete(text(ADD, first, ADD))
    assert found == text(ADD, f"\t{overlap.WAIT}", f"\t{overlap.LAUNCH_DEPENDENTS}", first, ADD)


def test_a_kernel_that_says_where_it_waits_is_left_alone():
    own = text(ADD, f"\t{overlap.WAIT}", "\tld.global.u32 \t%r2, [%rd1];")
    assert overlap.complete(own) == own


@pytest.mark.parametrize(("target", "raised"), [("sm_75", "sm_90"), ("sm_80", "sm_90"),
                                                ("sm_90a", "sm_90a")])
def test_for_hopper_comments_become_instructions(target, raised):
    found = overlap.hopper(text(ADD, f"\t{overlap.WAIT}", "\t// begin inline asm", target=target))
    assert found == text(ADD, "\tgriddepcontrol.wait;", "\t// begin inline asm", target=raised)


@pytest.mark.parametrize(("arch", "waits"), [("sm_80", 0), ("sm_90a", 1)])
@pytest.mark.parametrize("kernel", [flat_kernel("float32", "clip"), CONV], ids=lambda k: k.name)
def test_machine_code_waits_where_the_gpu_can(kernel, arch, waits):
    assert ptx(kernel).count(overlap.WAIT) == 1
    found = opcodes(cubin(kernel, arch))
    assert sum(count for opcode, count in found.items() if opcode.startswith("ACQBULK")) == waits


@pytest.mark.parametrize("tile", [MMA_TILES[0], WGMMA_TILES[0]], ids=["mma", "wgmma"])
def test_a_convolution_copies_weights_before_it_waits_and_lets_others_begin_after_its_sums(tile):
    code = ptx(conv_kernel("float16", tile, "clip", WHOLE))
    before, after = code.split(overlap.WAIT)
    assert "cp.async.cg.shared.global" in before
    assert after.index("mma") < after.index(overlap.LAUNCH_DEPENDENTS) < after.index("st.global")


def test_a_kernel_that_touches_its_input_too_early_is_found(monkeypatch):
    x, y = np.arange(-8, 8, dtype=np.float32), np.zeros(16, np.float32)
    spec = TensorSpec(x.shape)
    launches = prepare_unary(Relu(), [spec], spec, [], CudaOptions()).bind([x], y, y)
    emulate(launches, late=[x, y])
    assert y.tolist() == x.clip(0).tolist()
    monkeypatch.setattr(overlap, "hopper", lambda code: code)      # it waits no more
    with pytest.raises(TooEarly, match="before griddepcontrol"):
        emulate(launches, late=[x, y])


@pytest.fixture
def driver(monkeypatch):
    """CUDA's module of the driver, whose launches are recorded; `status` is their answer."""
    found = gpu.bindings()
    recorded = SimpleNamespace(status=found.CUresult.CUDA_SUCCESS)

    def launch(config, function, arguments, extra):
        recorded.config, recorded.function, recorded.arguments = config, function, arguments
        return (recorded.status,)
    stream = SimpleNamespace(ptr=77)
    monkeypatch.setattr(found, "cuLaunchKernelEx", launch)
    monkeypatch.setattr(gpu, "cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(
        get_current_stream=lambda: stream)))
    recorded.kinds = found.CUlaunchAttributeID
    return recorded


def launch_relu():
    """The launch, and what `execute` makes of its arguments: x and y lie at 16 and 32."""
    kernel = flat_kernel("float32", "clip")
    at = [SimpleNamespace(data=SimpleNamespace(ptr=pointer)) for pointer in (16, 32)]
    values = iter((*at, at[1])), iter((np.uint32(5),)), iter((np.float32(0), np.float32(6)))
    by_kind = dict(zip(("pointer", "uint32", "float32"), values, strict=True))
    args = [next(by_kind[kind]) for kind in kernel.signature]
    return Launch(kernel, (3, 2, 1), tuple(args)), args


def test_an_early_launch_is_what_the_driver_gets(driver):
    launch, args = launch_relu()
    gpu.launch_with_attributes(SimpleNamespace(ptr=1234), launch, args, True, 0)
    config = driver.config
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (3, 2, 1)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (launch.kernel.threads, 1, 1)
    assert config.sharedMemBytes == launch.kernel.shared_bytes
    assert (int(config.hStream), int(driver.function)) == (77, 1234)
    (attribute,) = config.attrs
    assert attribute.id == driver.kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert attribute.value.programmaticStreamSerializationAllowed == 1
    values, types = driver.arguments
    assert values == tuple(arg.data.ptr if kind == "pointer" else arg for kind, arg in
                           zip(launch.kernel.signature, args, strict=True))
    assert types == tuple(gpu.C_TYPES[kind] for kind in launch.kernel.signature)


@pytest.mark.parametrize("early", [False, True])
def test_a_cluster_is_what_the_driver_gets(early, driver):
    launch, args = launch_relu()
    launch = replace(launch, cluster=2)
    gpu.launch_with_attributes(SimpleNamespace(ptr=1234), launch, args, early, 0)
    cluster = driver.config.attrs[-1]
    assert (len(driver.config.attrs), driver.config.numAttrs) == (1 + early, 1 + early)
    assert cluster.id == driver.kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    size = cluster.value.clusterDim
    assert (size.x, size.y, size.z) == (1, 2, 1)


@pytest.mark.parametrize("cluster", [0, 4, 9])
def test_a_grid_that_can_not_be_cut_into_clusters_is_refused(cluster):
    launch, _ = launch_relu()
    with pytest.raises(ValueError, match=f"the 18 blocks .* clusters of {cluster}, of which "
                                         "every GPU with clusters admits 8"):
        replace(launch, grid=(1, 18, 1), cluster=cluster)


def test_an_early_launch_that_the_driver_refuses(driver):
    driver.status = gpu.bindings().CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(CudaError, match=r"could not be launched on GPU 3 with grid \(3, 2, 1\): "
                                        r"CUDA_ERROR_INVALID_VALUE$"):
        gpu.launch_with_attributes(SimpleNamespace(ptr=1234), *launch_relu(), True, 3)
    gpu.check_context(3)


def test_an_error_that_loses_the_context_is_remembered(driver, monkeypatch):
    monkeypatch.setattr(gpu, "_lost", {})
    driver.status = gpu.bindings().CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(CudaError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS.*context is lost"):
        gpu.launch_with_attributes(SimpleNamespace(ptr=1234), *launch_relu(), True, 3)
    with pytest.raises(CudaError, match="context is lost"):
        gpu.check_context(3)


def test_bindings_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    gpu.bindings.cache_clear()
    with pytest.raises(CudaError, match="pip install cuda-bindings"):
        gpu.bindings()
