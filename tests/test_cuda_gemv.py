"""Matrix-vector products on CUDA: few samples, any number of features and outputs."""
import numpy as np
import pytest
from checks import integers, normal, sum_bound
from cuda_checks import DTYPES, assert_exact, assert_resources, assert_within
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_matmul_mma import WEIGHTS, arrays

from kernels import ops
from kernels.cuda import gemv as device
from kernels.cuda import sass, vector
from kernels.cuda.host import gemv, matmul
from kernels.cuda.launch import CudaOptions
from kernels.ops import Linear, TensorSpec

SLOW = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("float16", "bfloat16")]
FEWER = ["float32", "float16", SLOW[1]]
MANY = 0        # multiprocessors: any number of outputs occupies them


def short(rng, *shape):
    """-1, 0 and 1: sums of hundreds of products are still exact in bfloat16."""
    return integers(rng, *shape, low=-1, high=2)


@pytest.mark.parametrize("dtype", FEWER)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("features", [136, 1336])
def test_whole_accesses_are_exact(features, samples, dtype, runner):
    most = 1 if samples == 1 else 4
    for owner, processors in (("warp", MANY), ("block", 132)):
        if owner == "block" and features <= 32 * vector.lanes(dtype) * device.UNROLL:
            continue                    # one round of a warp: a block would have idle threads
        assert_exact(Linear(ops.Relu()), *arrays(short, samples, features, 10), weights=WEIGHTS,
                     dtype=dtype, multiprocessors=processors, runner=runner,
                     kernel=f"gemv_{owner}_{vector.short(dtype)}x{vector.lanes(dtype)}_m{most}_")


@pytest.mark.parametrize("dtype", ["float32", *SLOW])
@pytest.mark.parametrize("features", [1, 261])
def test_features_that_are_no_whole_accesses_are_exact(features, dtype, runner):
    for samples in (1, 3):
        assert_exact(Linear(), *arrays(short, samples, features, 5), weights=WEIGHTS, dtype=dtype,
                     multiprocessors=MANY, runner=runner,
                     kernel=f"gemv_warp_{vector.short(dtype)}x1_m")


@given(st.integers(1, 4), st.integers(1, 700), st.integers(1, 40), st.sampled_from([MANY, 132]))
@settings(max_examples=12, deadline=None)
def test_any_size_is_exact_on_integers(samples, features, outputs, processors):
    assert_exact(Linear(), *arrays(integers, samples, features, outputs), weights=WEIGHTS,
                 multiprocessors=processors, kernel="gemv_")


def test_samples_may_have_several_axes_and_no_bias(runner):
    x, weight, _ = arrays(integers, 1, 2, 2, 24, 9)
    assert_exact(Linear(), x, weight, weights=(1,), kernel="gemv_warp_f32x4_m4_", runner=runner)


@pytest.mark.parametrize("dtype", ["float32", *SLOW])
@pytest.mark.parametrize("activation", [None, ops.Silu()])
def test_floats_are_within_the_bound(activation, dtype, runner):
    def make(rng, *shape):
        return normal(rng, *shape).astype(dtype).astype(np.float32)

    inputs = arrays(make, 1, 264, 16)
    # No activation is steeper than 1.1, and its own arithmetic rounds a few times.
    bound = 1.1 * sum_bound(Linear(), 264, *inputs) + 4e-7 * (activation is not None)
    assert_within(bound, Linear(activation), *inputs, weights=WEIGHTS, dtype=dtype,
                  multiprocessors=MANY, kernel="gemv_warp", runner=runner)


def test_nan_and_infinity_travel_as_ieee_says(runner):
    x, weight, bias = arrays(short, 4, 135, 6)
    weight[weight == 0] = 1
    x[1, 134], x[2, 0], x[3, 77] = np.nan, np.inf, -np.inf
    assert_exact(Linear(), x, weight, bias, weights=WEIGHTS, kernel="gemv_", runner=runner)


def kernel_for(samples, features, outputs, dtype="float32", multiprocessors=132, arch="sm_90a"):
    stored = "float32" if dtype == "tf32" else dtype
    shapes = (samples, features), (outputs, features)
    options = CudaOptions(dtype=dtype, arch=arch, multiprocessors=multiprocessors)
    weights = [None, np.zeros(shapes[1], np.float32)]
    return matmul.prepare_linear(Linear(), [TensorSpec(shape, stored) for shape in shapes],
                                 TensorSpec((samples, outputs), stored), weights, options).kernel


def test_the_number_of_samples_and_outputs_decides():
    assert kernel_for(1, 2048, 1000).startswith("gemv_block_f32x4_m1")
    assert kernel_for(1, 4096, 4096).startswith("gemv_warp_f32x4_m1")
    assert kernel_for(4, 960, 1000, "float16").startswith("gemv_warp_f16x8_m4")
    assert kernel_for(5, 2048, 1000).startswith("conv_simt")
    assert kernel_for(5, 2048, 1000, "bfloat16").startswith("conv_wgmma_bf16")
    assert kernel_for(1, 2048, 1000, "tf32").startswith("gemv_block_f32")
    with pytest.raises(ValueError, match=r"Linear: dtype 'float16' needs .* this GPU is sm_75"):
        kernel_for(1, 64, 10, "float16", arch="sm_75")


@pytest.mark.parametrize("dtype", FEWER)
def test_resources(dtype, arch):
    kernel = gemv.kernel_of(dtype, vector.lanes(dtype), 1, 32, "clip")
    loop = sass.loop_opcodes(assert_resources(kernel, arch).cubin, "LDG")
    wide = sum(n for opcode, n in loop.items() if opcode.startswith("LDG.E.128"))
    assert wide == sass.number(loop, "LDG") == 2 * device.UNROLL       # of weights and of x


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_resources_of_all(dtype, arch):
    for kernel in gemv.kernels(dtype):
        assert_resources(kernel, arch)
