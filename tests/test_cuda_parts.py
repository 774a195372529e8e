"""Values that lie in what a Concat gives, on CUDA: kernels that write, or read, some channels of a
wider array give the same bits as in an array of its own, and touch nothing beside it."""
import networks
import numpy as np
import onnx
import pytest
import test_cuda_conv_halo
from checks import integers, normal
from cuda_checks import (
    GARBAGE,
    STORED,
    bits,
    prepare,
    rounded,
    run,
    run_step,
    skip_on_others,
    storage,
    uploader,
)
from test_cuda_conv import arrays, signs, small

import cnn
from kernels import ops
from kernels.cuda.conv_gemm import CLUSTER, PLANE, WHOLE
from kernels.cuda.emulate import emulate
from kernels.cuda.host import conv, conv_choice
from kernels.cuda.launch import CudaOptions
from kernels.emulator.errors import Misaligned
from kernels.ops import Conv2d, TensorSpec

WGMMA = conv_choice.WGMMA_TILES[-1]
SAME = Conv2d((1, 1), (1, 1, 1, 1), activation=ops.Relu())


def within(array, unit):
    """The array as some channels of a wider one, whose others are garbage."""
    *places, channels = array.shape
    wide = np.full((*places, channels + 2 * unit), GARBAGE, np.uint8).astype(array.dtype)
    wide[..., unit:unit + channels] = array
    return wide[..., unit:unit + channels]


def check(op, *inputs, dtype, weights=(), kernel, runner, reads=True, arch="sm_90a", **choice):
    """reads: whether the first input may be a part, too."""
    given = [np.asarray(array, np.float32) if i in weights else rounded(array, dtype)
             for i, array in enumerate(inputs)]
    step = prepare(op, given, dtype, weights,
                   CudaOptions(dtype=dtype, arch=arch, multiprocessors=4, upload=uploader(runner)),
                   **choice)
    assert step.kernel.startswith(kernel), step.kernel
    unit = 8 if dtype == "float32" else 16          # 32 bytes
    assert (step.strided, step.reads_strided) == (unit, unit * reads)
    shape = ops.known(op.output_shape(*(array.shape for array in inputs)))
    apart = run(op, *inputs, dtype=dtype, weights=weights, kernel=kernel, runner=runner, arch=arch,
                **choice)
    if reads:
        given[0] = within(given[0], unit)
    found = run_step(step, given, TensorSpec(shape, storage(dtype)), runner, unit)
    np.testing.assert_array_equal(bits(found), bits(apart))


# ---- convolutions -----------------------------------------------------------------------------

@pytest.mark.parametrize("end", [WHOLE, PLANE, CLUSTER])
@pytest.mark.parametrize("outputs", [32, 24, 20, 9])
@pytest.mark.parametrize(("dtype", "tile"), [
    ("float16", WGMMA), pytest.param("float16", small("float16"), marks=pytest.mark.slow)],
    ids=["wgmma", "mma"])
def test_convolutions(dtype, tile, outputs, end, runner):
    """Whole chunks of y; rows that are not aligned; and what adds up planes of splits."""
    skip_on_others(runner, "wgmma needs sm_90a", lambda arch: arch == "sm_90a")
    check(SAME, *arrays(signs, 2, 5, 6, 40, outputs, (3, 3)), weights=(1, 2), dtype=dtype,
          tile=tile, splits=1 if end == WHOLE else 3, cluster=end == CLUSTER,
          kernel=conv.conv_kernel(dtype, tile, "clip", end).name, runner=runner)


@pytest.mark.parametrize(("op", "shape"), [
    (Conv2d(), (2, 5, 6, 40, 24, (1, 1))),
    (Conv2d((2, 2), (1, 1, 1, 1)), (2, 9, 10, 24, 16, (3, 3))),
    (Conv2d((1, 2), (1, 0, 2, 3), (2, 3)), (1, 9, 12, 16, 24, (3, 2))),
    (Conv2d((1, 1), (1, 1, 1, 1), groups=3), (1, 6, 6, 48, 72, (3, 3), 3)),
    (Conv2d((1, 1), (1, 1, 1, 1), groups=8), (1, 6, 6, 32, 32, (3, 3), 8))],
    ids=["1x1", "stride 2", "asymmetric", "groups", "narrow groups"])
def test_windows_of_parts(op, shape, runner):
    skip_on_others(runner, "wgmma needs sm_90a", lambda arch: arch == "sm_90a")
    check(op, *arrays(signs, *shape), weights=(1, 2), dtype="float16", tile=WGMMA, splits=1,
          kernel="conv_wgmma_", runner=runner)


@pytest.mark.parametrize(("op", "shape"), [
    (Conv2d((1, 1), (1, 1, 1, 1)), (2, 6, 6, 12, 24, (3, 3))),      # channels are filled up
    (Conv2d((4, 4)), (2, 8, 12, 8, 16, (4, 4)))],                   # a line is one pixel
    ids=["folded", "patches"])
def test_what_is_not_read_pixel_by_pixel_can_be_no_part(op, shape, runner):
    check(op, *arrays(signs, *shape), weights=(1, 2), dtype="float16", tile=small("float16"),
          splits=1, kernel="conv_mma_", runner=runner, reads=False)


def test_linear_layers(runner):
    rng = np.random.default_rng(0)
    check(ops.Linear(), signs(rng, 9, 40), signs(rng, 24, 40), signs(rng, 24), weights=(1, 2),
          dtype="float16", tile=small("float16"), splits=1, kernel="conv_mma_", runner=runner)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_on_cuda_cores(groups, runner):
    check(Conv2d(groups=groups), *arrays(signs, 2, 5, 6, 24, 48, (3, 3), groups), weights=(1, 2),
          dtype="float32", tile=small("float32"), splits=1, kernel="conv_simt_", runner=runner)


def test_convolutions_from_pixels_in_shared_memory(runner):
    skip_on_others(runner, "wgmma needs sm_90a", lambda arch: arch == "sm_90a")
    with test_cuda_conv_halo.chosen(test_cuda_conv_halo.SMALL):
        check(SAME, *arrays(signs, 2, 6, 9, 64, 72, (3, 3)), weights=(1, 2), dtype="float16",
              kernel="conv_halo_", runner=runner, reads=False)


@pytest.mark.parametrize("kernel", ["conv_halo_", "conv_wgmma_"])
def test_what_walks_through_y_and_a_residual_writes_no_part(kernel):
    _, weight, bias = arrays(signs, 1, 1, 1, 64, 64, (3, 3))
    x = y = TensorSpec((8, 31, 30, 64), "float16")
    specs = [x, TensorSpec(weight.shape), TensorSpec(bias.shape)]
    with test_cuda_conv_halo.chosen(test_cuda_conv_halo.SMALL):
        for residual, unit in ((), 16), ((y,), 0):
            step = conv.prepare_conv2d(
                SAME, [*specs, *residual], y, [None, weight, bias, None],
                CudaOptions(dtype="float16", arch="sm_90a", multiprocessors=4),
                tile=None if kernel == "conv_halo_" else WGMMA, splits=1)
            assert step.kernel.startswith(kernel)
            assert step.strided == unit


# ---- all others -------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("channels", [32, 12, 5])
def test_batch_norms_read_and_write_parts(channels, dtype, runner):
    rng = np.random.default_rng(0)
    check(ops.BatchNorm(1e-3, ops.Relu()), normal(rng, 2, 3, 5, channels),
          *(normal(rng, channels) for _ in range(3)), rng.uniform(0.1, 2, channels),
          weights=(1, 2, 3, 4), dtype=dtype, kernel="batch_norm_", runner=runner)


@pytest.mark.parametrize("op", [ops.MaxPool2d((3, 3), (2, 2), (1, 1, 1, 1)),
                                ops.MaxPool2d((5, 5), (1, 1), (2, 2, 2, 2)),
                                ops.AvgPool2d((2, 2), (2, 2))], ids=["3x3", "5x5", "avg"])
@pytest.mark.parametrize("channels", [32, 6])
def test_pools_read_and_write_parts(op, channels, runner):
    check(op, normal(np.random.default_rng(0), 2, 7, 9, channels), dtype="float16",
          kernel="avg_" if isinstance(op, ops.AvgPool2d) else "max_", runner=runner)


@pytest.mark.parametrize("widths", [(8, 24, 16), (3, 5, 4), (3, 5, 6), (8, 4, 4), (2, 2, 12)])
@pytest.mark.parametrize("there", [(), (0,), (1, 2)])
def test_concats_copy_into_a_part_what_is_not_there_yet(there, widths):
    """Of a step that more is a multiple of than of their own width."""
    rng, unit = np.random.default_rng(0), 16
    given = [rounded(integers(rng, 2, 3, 5, width), "float16") for width in widths]
    step = prepare(ops.Concat(-1), given, "float16", (), CudaOptions(dtype="float16"))
    assert step.strided == unit
    joined = np.concatenate(given, -1)
    *places, channels = joined.shape
    wide = np.full((*places, unit + 64), 77, np.float16)
    part, starts = wide[..., unit:unit + channels], np.cumsum([0, *widths])
    for i in there:
        part[..., starts[i]:starts[i + 1]] = given[i]
    launches = step.bind([None if i in there else x for i, x in enumerate(given)], part,
                         np.empty(0, np.uint8))
    assert len(launches) == len(widths) - len(there)
    emulate(launches)
    np.testing.assert_array_equal(part, joined)
    assert (wide[..., :unit] == 77).all()
    assert (wide[..., unit + channels:] == 77).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_concats_along_other_axes_have_no_parts(axis):
    x = np.zeros((2, 3, 4, 8), STORED["float16"])
    step = prepare(ops.Concat(axis), [x, x], "float16", (), CudaOptions(dtype="float16"))
    assert step.strided == 0


# ---- networks ---------------------------------------------------------------------------------

def fires(net):
    """Fire modules, as in SqueezeNet: a Concat joins two convolutions."""
    x = networks.fire(net, net.relu(net.conv("input", "0", 16, 3, stride=2)), "1", 8, 1.0)
    x = networks.fire(net, net.max_pool(x, "2", 3, stride=2), "3", 16, 1.0)
    net.linear(net.global_pool(x), "head", 10)


def dense(growth):
    """A dense block and a transition, as in DenseNet: norms read what is joined so far."""
    def build(net):
        x = net.max_pool(net.conv("input", "conv0", 32, 3, stride=2), "pool0", 3, stride=2)
        for layer in range(3):
            y = net.relu(net.batch_norm(x, f"{layer}.norm1"))
            y = net.relu(net.batch_norm(net.conv(y, f"{layer}.conv1", 24, 1), f"{layer}.norm2"))
            x = net.concat([x, net.conv(y, f"{layer}.conv2", growth, 3)], f"{layer}.concat")
        x = net.conv(net.relu(net.batch_norm(x, "norm3")), "transition", 24, 1)
        net.linear(net.global_pool(net.average_pool(x, "pool3", 2, stride=2)), "head", 10)
    return build


def aggregation(net):
    """Convolutions, each of the one before, all joined, as in VoVNet and YOLO."""
    x = [net.relu(net.conv(net.conv("input", "stem", 8, 3, stride=2), "0", 16, 1))]
    for i in range(1, 4):
        x.append(net.relu(net.conv(x[-1], f"{i}", 16, 3)))
    net.linear(net.global_pool(net.relu(net.conv(net.concat(x, "concat"), "last", 24, 1))),
               "head", 10)


def mixed(net):
    """What a depthwise convolution gives is copied to between the outputs of two others."""
    x = net.conv(net.conv("input", "stem", 8, 3, stride=2), "before", 16, 1)
    each = [net.relu(net.conv(x, "first", 16, 1)), net.conv(x, "depthwise", 16, 3, groups=16),
            net.relu(net.conv(x, "last", 16, 3))]
    net.linear(net.global_pool(net.relu(net.conv(net.concat(each, "concat"), "after", 24, 1))),
               "head", 10)


def pyramid(net):
    """Pools of pools, all joined, as in YOLO's SPPF."""
    x = [net.relu(net.conv(net.conv("input", "stem", 8, 3, stride=2), "conv", 16, 1))]
    for i in range(3):
        x.append(net.max_pool(x[-1], f"pool{i}", 3, stride=1, padding=1))
    net.linear(net.global_pool(net.relu(net.conv(net.concat(x, "concat"), "last", 24, 1))),
               "head", 10)


@pytest.fixture(params=[pytest.param("emulator", marks=pytest.mark.slow), "emulator:sm_90a",
                        "stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "stand-in":
        request.getfixturevalue("machine")()
        return "cuda"
    return request.param


@pytest.mark.parametrize(("build", "copied"), [
    (fires, {}), (dense(16), {}), (aggregation, {}), (pyramid, {}),
    (mixed, {"concat": "concat_copy_b16x8"}),
    # Of 92 channels no part can be.
    (dense(20), {"0.concat": "concat_copy_b16x4", "1.concat": "concat_copy_b16x4",
                 "2.concat": "concat_copy_b16x4"})],
    ids=["fires", "dense", "aggregation", "pyramid", "mixed", "odd"])
def test_no_concat_copies_what_can_lie_there(build, copied, device, tmp_path, monkeypatch):
    """And where all is copied, bits are the same."""
    net = networks.Builder(0, 32)
    build(net)
    onnx.save(net.model("network"), tmp_path / "net.onnx")
    x = np.random.default_rng(1).standard_normal((2, 3, 32, 32), dtype=np.float32)

    def outcome():
        model = cnn.load(tmp_path / "net.onnx", device=device, dtype="float16")
        kernels = {row.layer: row.kernel for row in model.summary(2).rows
                   if row.layer.endswith("concat")}
        return kernels, model.run({"input": x})["logits"]

    kernels, found = outcome()
    assert {name for name, kernel in kernels.items() if kernel != "(view)"} == copied.keys()
    assert all(kernels[name] == kernel for name, kernel in copied.items())
    monkeypatch.setattr("cnn.plan.parts", lambda *arguments: {})
    others, expected = outcome()
    assert all(kernel.startswith("concat_copy_") for kernel in others.values())
    np.testing.assert_array_equal(found, expected)


def test_the_emulator_sees_where_a_part_begins():
    """What lies in the middle of a wider array is no better aligned than on a GPU."""
    x, ones = np.zeros((3, 5, 8), np.float16), np.ones(8, np.float32)
    step = prepare(ops.BatchNorm(), [x, ones, ones, ones, ones], "float16", (1, 2, 3, 4),
                   CudaOptions(dtype="float16"))
    wide = np.zeros((3, 5, 24), np.float16)
    emulate(step.bind([x], wide[..., 8:16], None))
    with pytest.raises(Misaligned):
        emulate(step.bind([x], wide[..., 4:12], None))
