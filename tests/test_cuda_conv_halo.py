"""The convolution from pixels in shared memory: strips, tiles, waits, machine code, its choice."""
import contextlib
from functools import partial
from unittest import mock

import numpy as np
import pytest
from checks import sum_bound
from cuda_checks import assert_exact, assert_resources, assert_within, run, skip_on_others
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_conv import WEIGHTS, arrays, representable, signs

from kernels import ops
from kernels.cuda import compiler, conv_halo, emulate, sass
from kernels.cuda.activation import ACTIVATIONS
from kernels.cuda.conv_halo import HaloTile
from kernels.cuda.errors import CudaError
from kernels.cuda.host import conv_halo as host
from kernels.cuda.host.conv_halo import TILE
from kernels.cuda.launch import CudaOptions
from kernels.emulator import AsyncNotWaited, EmulatorError, Race
from kernels.ops import Conv2d, TensorSpec

SMALL = HaloTile(64, 3, 2, 2)           # the least work for the emulator
OFTEN = HaloTile(128, 1, 4, 2)          # a barrier for each tap
TILES = [TILE, SMALL, OFTEN]
DTYPES = ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)]
SAME = (1, 1, 1, 1)
PROBLEMS = {        # (op, (batch, height, width, channels, outputs, kernel))
    "VGG": (Conv2d((1, 1), SAME), (1, 5, 62, 64, 64, (3, 3))),
    "several images": (Conv2d((1, 1), SAME), (5, 7, 7, 64, 24, (3, 3))),
    "images smaller than a round of copies": (Conv2d((1, 1), SAME), (40, 1, 2, 64, 8, (3, 3))),
    "strips": (Conv2d((1, 1), SAME), (2, 3, 125, 64, 8, (3, 3))),
    "one pixel": (Conv2d((1, 1), SAME), (1, 1, 1, 64, 8, (3, 3))),
    "no padding": (Conv2d(), (2, 6, 30, 64, 8, (3, 3))),
    "strips without padding": (Conv2d(), (1, 4, 66, 64, 8, (3, 3))),
    "asymmetric padding": (Conv2d((1, 1), (2, 0, 1, 2)), (2, 6, 9, 64, 8, (3, 3))),
    "two tiles of outputs": (Conv2d((1, 1), SAME), (2, 6, 9, 64, 72, (3, 3))),
    "more than half a tile": (Conv2d((1, 1), SAME), (2, 6, 9, 64, 40, (3, 3))),
    "5x5": (Conv2d((1, 1), (2, 2, 2, 2)), (1, 6, 29, 64, 8, (5, 5))),
    "2x5": (Conv2d((1, 1), (1, 0, 0, 4)), (2, 5, 11, 64, 8, (2, 5))),
    "5x2": (Conv2d((1, 1), (0, 1, 4, 1)), (2, 5, 11, 64, 8, (5, 2))),
}


@pytest.fixture
def runner(runner):
    skip_on_others(runner, f"wgmma needs {conv_halo.ARCH}", lambda arch: arch == conv_halo.ARCH)
    return runner


@contextlib.contextmanager
def chosen(tile, prepare=host.prepare_conv_halo):
    """Inside, every layer gets this tile."""
    with (mock.patch.object(host, "serves", return_value=True),
          mock.patch.object(host, "prepare_conv_halo", partial(prepare, tile=tile))):
        yield


def check(op, *inputs, tile=SMALL, dtype="float16", **options):
    """assert_exact of this tile."""
    _, kh, kw, _ = inputs[1].shape
    with chosen(tile):
        assert_exact(op, *inputs, weights=WEIGHTS[:len(inputs) - 1], dtype=dtype,
                     kernel=host.kernel_of(dtype, tile, (kh, kw), "clip").name, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_kind_of_layer_is_exact(problem, dtype, runner):
    op, shape = PROBLEMS[problem]
    check(op, *arrays(signs, *shape), dtype=dtype, runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [64, 48, 72])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_is_exact(tile, outputs, dtype, runner):
    """With a residual, of runs of outputs that are there and that are not."""
    op = Conv2d((1, 1), SAME, activation=ops.Clip(-6.0, 20.0))
    inputs = arrays(signs, 2, 5, 30, 64, outputs, (3, 3))
    residual = signs(np.random.default_rng(1), 2, 5, 30, outputs)
    check(op, *inputs, residual, tile=tile, dtype=dtype, runner=runner)


@st.composite
def layers(draw):
    kernel = draw(st.sampled_from([(3, 3), (3, 3), (2, 5), (5, 2), (3, 4), (4, 3), (5, 5)]))
    padding = tuple(draw(st.integers(0, k - 1)) for k in kernel * 2)
    h = draw(st.integers(max(1, kernel[0] - padding[0] - padding[2]), 9))
    w = draw(st.one_of(*(st.integers(max(low, kernel[1] - padding[1] - padding[3]), high)
                         for low, high in ((1, 9), (20, 40), (60, 70)))))
    op = Conv2d((1, 1), padding, activation=draw(st.sampled_from([None, ops.Relu()])))
    return op, (draw(st.integers(1, 3)), h, w, 64, draw(st.sampled_from([8, 64])), kernel)


@pytest.mark.slow
@given(layers())
@settings(max_examples=25, deadline=None)
def test_any_layer_is_exact_on_integers(layer):
    op, shape = layer
    check(op, *arrays(signs, *shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [ops.Clip(0.0, 6.0), *(
    pytest.param(other, marks=pytest.mark.slow) for other in (
        ops.Silu(), ops.Gelu(), ops.Elu(0.5), ops.HardSwish(), ops.HardSigmoid(0.2, 0.5)))])
def test_floats_are_within_the_bound(activation, dtype, runner):
    """As a network has it, of which the host chooses the kernel itself."""
    op = Conv2d((1, 1), SAME, activation=activation)
    inputs = arrays(representable(dtype), 2, 19, 30, 64, 64, (3, 3))
    # As of mma.sync: tensor cores truncate, and no activation is steeper than 1.1.
    bound = 2.2 * sum_bound(Conv2d(op.stride, op.padding), 576, *inputs) + 4e-7
    assert_within(bound, op, *inputs, weights=WEIGHTS, dtype=dtype, kernel="conv_halo_",
                  runner=runner, multiprocessors=1)


def test_bias_may_be_left_out(runner):
    x, weight, _ = arrays(signs, 1, 5, 9, 64, 16, (3, 3))
    check(Conv2d(padding=SAME), x, weight, runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_travel_as_ieee_says(dtype, runner):
    x, weight, bias = arrays(signs, 1, 8, 9, 64, 24, (3, 3))
    weight[weight == 0] = 1
    x[0, 0, 0, 2], x[0, 3, 8, 5], x[0, 7, 1, 15] = np.nan, np.inf, -np.inf
    check(Conv2d(padding=SAME), x, weight, bias, dtype=dtype, runner=runner)


@pytest.mark.parametrize(("before", "after", "number", "fault"), [
    ("fence.proxy.async.shared::cta;", "", 3, Race),
    ("cp.async.wait_group 0;", "cp.async.wait_group 1;", 3, AsyncNotWaited),
    ("bar.sync \t0;", "", 3, Race),
    ("wgmma.wait_group.sync.aligned 0;", "", 2, (Race, AsyncNotWaited)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_each_wait_fence_and_barrier_is_needed(before, after, number, fault, monkeypatch):
    """There is one for each line of taps; but nothing is copied over what the second one read."""
    parts = compiler.ptx(host.kernel_of("float16", TILE, (3, 3), "clip")).split(before)
    assert len(parts) == number + 1
    for i in range(number):
        text = before.join(parts[:i + 1]) + after + before.join(parts[i + 1:])
        assert_fault(text, fault, monkeypatch)


def test_it_waits_for_its_inputs(monkeypatch):
    whole = compiler.ptx(host.kernel_of("float16", TILE, (3, 3), "clip"))
    assert whole.count("griddepcontrol.wait;") == 1
    assert_fault(whole.replace("griddepcontrol.wait;", ""), EmulatorError, monkeypatch)


def assert_fault(text, fault, monkeypatch):
    """That the kernel with this PTX has it."""
    monkeypatch.setattr(emulate, "ptx", lambda kernel: text)
    with chosen(TILE), pytest.raises(fault):
        run(Conv2d((1, 1), SAME), *arrays(signs, 1, 3, 50, 64, 8, (3, 3)), dtype="float16",
            weights=WEIGHTS)


@pytest.mark.parametrize("tile", [
    TILE._replace(block_m=96), TILE._replace(block_m=192), TILE._replace(taps=0),
    TILE._replace(stages=1), TILE._replace(stages=5)], ids=str)
def test_a_tile_that_can_not_be_cut_is_refused(tile):
    with pytest.raises(ValueError, match="can not be cut evenly"):
        conv_halo.make("float16", tile, (3, 3), "clip")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [name if name in ("clip", "silu") else pytest.param(
    name, marks=pytest.mark.slow) for name in ACTIVATIONS])
def test_resources(activation, dtype):
    found = assert_resources(host.kernel_of(dtype, TILE, (3, 3), activation), conv_halo.ARCH)
    registers = -(-found.registers // 8) * 8                        # as they are allocated
    assert registers * TILE.threads * TILE.blocks <= 65536
    assert (TILE.shared_bytes + 1024) * TILE.blocks <= 228 * 1024
    # Nine taps, four products each, a barrier for each three of them, and two waits: the assembler
    # did not serialise them.
    assert sass.number(found.counts, "HGMMA") == 9 * 4
    assert sass.number(found.counts, "WARPGROUP") == 9 + 2
    assert sass.number(found.counts, "BAR") == 3
    assert sass.number(found.counts, "LDGSTS") == 9 + TILE.rows // TILE.round_rows
    # Neither operands nor sums pass through registers to or from shared memory.
    assert not any(sass.number(found.counts, opcode) for opcode in ("LDSM", "LDS", "STS"))


def test_few_instructions_stand_beside_the_products():
    found = assert_resources(host.kernel_of("float16", TILE, (3, 3), "clip"), conv_halo.ARCH)
    code = sass.instructions(sass.disassemble(found.cubin))
    products = [i for i, instruction in enumerate(code) if instruction.opcode.startswith("HGMMA")]
    copies = [i for i, instruction in enumerate(code) if instruction.opcode.startswith("LDGSTS")]
    assert sum(i < products[0] for i in copies) == 3 + 6
    assert copies[8] <= 200                                 # six pixels and three taps
    assert products[-1] - products[0] <= 160
    assert len(code) - products[-1] <= 260


def test_no_other_architecture_runs_it():
    with pytest.raises(CudaError, match="runs on GPUs of sm_90a alone and this one is sm_100a"):
        compiler.cubin(host.kernel_of("float16", TILE, (3, 3), "clip"), "sm_100a")


def serves(op=None, shape=(256, 56, 56, 64, 64, (3, 3)), dtype="float16", arch="sm_90a",
           residual=False):
    """The tile that a layer gets on an H200."""
    op = op or Conv2d((1, 1), SAME)
    batch, h, w, channels, outputs, kernel = shape
    given = [(batch, h, w, channels), (outputs, *kernel, channels // op.groups), (outputs,)]
    output = TensorSpec(ops.known(op.output_shape(*given)), dtype)
    inputs = [TensorSpec(s, dtype) for s in given] + [output] * residual
    return host.serves(op, inputs, output, CudaOptions(dtype=dtype, arch=arch, multiprocessors=132))


@pytest.mark.parametrize(("shape", "expected"), [
    ((256, 56, 56, 64, 64, (3, 3)), True), ((32, 224, 224, 64, 64, (3, 3)), True),
    ((22, 56, 56, 64, 64, (3, 3)), True), ((16, 56, 56, 64, 64, (3, 3)), False),
    ((1, 56, 56, 64, 64, (3, 3)), False), ((2, 224, 224, 64, 64, (3, 3)), True),
    ((1024, 14, 14, 64, 64, (3, 3)), True), ((1024, 7, 7, 64, 64, (3, 3)), False),
    ((64, 56, 56, 64, 56, (3, 3)), True), ((64, 56, 56, 64, 40, (3, 3)), False),
    ((64, 112, 112, 64, 128, (3, 3)), False), ((256, 28, 28, 128, 64, (3, 3)), False)], ids=str)
def test_it_serves_large_layers_of_which_little_is_wasted(shape, expected):
    assert serves(shape=shape) == serves(shape=shape, residual=True) == expected


@pytest.mark.parametrize("other", [
    {"op": Conv2d((2, 2), SAME)}, {"op": Conv2d((1, 1), SAME, (2, 2))},
    {"op": Conv2d((1, 1), SAME, groups=2)}, {"op": Conv2d((1, 1), (3, 1, 1, 1))},
    {"shape": (256, 56, 56, 64, 64, (1, 1))}, {"shape": (256, 56, 56, 64, 64, (3, 2))},
    {"shape": (256, 56, 56, 64, 64, (1, 9))}, {"shape": (256, 56, 56, 96, 64, (3, 3))},
    {"shape": (256, 56, 56, 64, 60, (3, 3))}, {"dtype": "float32"}, {"dtype": "tf32"},
    {"arch": "sm_90"}, {"arch": "sm_100a"}], ids=str)
def test_other_layers_are_left_to_other_kernels(other):
    assert not serves(**other)


def test_strips_are_as_wide_as_a_tile_reaches():
    for width, number, pitch in ((62, 1, 63), (63, 2, 34), (112, 2, 58), (224, 4, 58)):
        op, shape = Conv2d((1, 1), SAME), (2, 8, width, 64)
        inputs = [TensorSpec(shape, "float16"), TensorSpec((64, 3, 3, 64), "float16")]
        strips = host.Strips.of(op, inputs, TensorSpec((2, 8, width, 64), "float16"))
        assert (strips.number, strips.pitch, strips.lines) == (number, pitch, 9)
        assert strips.positions == 2 * 9 * pitch
