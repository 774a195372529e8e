"""Instructions that multiply bfloat16: what emulated ones compute, what real ones compile to."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numba
import numpy as np
import pytest

from kernels.cpu import dot_units
from kernels.cpu.dot_simd import (
    BLOCK,
    configure,
    multiply,
    narrow,
    release,
)
from kernels.cpu.host import unit_choice
from kernels.cpu.simd import at
from kernels.cpu.sizes import LANES

POISON = 0xABAD
NO_NUMBERS = np.float32(0), np.float32(0), 0, *[np.float32(0)] * 3     # of a Writer


@numba.njit
def products(unit, x, w, sums, steps):
    """The largest micro-kernel over one run; 2 * COLUMNS output channels. Nothing is written."""
    configure(unit, unit.depth)
    rows = unit.sizes[-1]
    taps = np.arange(steps) * unit.depth if unit.depth > unit.together else np.zeros(1, np.int64)
    multiply(unit, 2 * len(unit.sizes) - 1, 0, (
        at(x, 0), x.size // rows, at(taps, 0), len(taps), steps // len(taps), unit.depth, at(w, 0),
        at(sums, 0), at(sums, 0), at(sums, 0), at(sums, 0), 0, at(sums, 0), at(taps, 0),
        at(sums, 0), 0, 0, *NO_NUMBERS))
    release(unit)


@numba.njit
def round_all(x, y, count, padded):
    narrow(at(y, 0), at(x, 0), count, padded, np.float32(1), 0)


def numbers(rng, *shape):
    """Random bfloat16 as float32, of 2 ** -7 to 2 ** 3: float64 holds all their products' sums."""
    x = rng.uniform(2.0 ** -7, 8, shape) * rng.choice([-1, 1], shape)
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def bits(x):
    return x.astype(ml_dtypes.bfloat16).view(np.uint16).ravel()


def fused(x, y, z):
    """x * y + z, rounded once."""
    return (x.astype(float) * y + z).astype(np.float32)


def tile_sums(x, w):
    """Intel's definition of tdpbf16ps: 32 inputs a step."""
    total = np.zeros((len(x), w.shape[1]), np.float32)
    for start in range(0, len(w), 32):
        even, odd = np.zeros_like(total), np.zeros_like(total)
        for k in range(start, start + 32, 2):
            even = fused(x[:, k, None], w[k], even)
            odd = fused(x[:, k + 1, None], w[k + 1], odd)
        total += even + odd
    return total


def vector_sums(x, w):
    """Intel's definition of vdpbf16ps: the odd input of each pair first."""
    total = np.zeros((len(x), w.shape[1]), np.float32)
    for k in range(0, len(w), 2):
        total = fused(x[:, k, None], w[k], fused(x[:, k + 1, None], w[k + 1], total))
    return total


@pytest.mark.parametrize(("unit", "definition"), [
    (dot_units.AMX_EMULATED_BF16, tile_sums), (dot_units.AVX512_EMULATED_BF16, vector_sums)],
    ids=["amx", "avx512"])
def test_emulated_instructions_sum_in_the_order_of_the_manual(unit, definition):
    rng, depth = np.random.default_rng(0), 96
    x, w = numbers(rng, unit.rows, depth), numbers(rng, depth, BLOCK)
    panel = bits(w.reshape(depth // 2, 2, BLOCK).transpose(0, 2, 1))
    sums = np.full(unit.rows * BLOCK, np.nan, np.float32)
    products(unit, bits(x), panel, sums, depth // unit.depth)
    expected = definition(x, w)
    assert not np.array_equal(expected, x @ w)      # the order is seen
    np.testing.assert_array_equal(sums.reshape(unit.rows, BLOCK), expected)


SPECIAL = np.array([0, -0.0, 1, 1 + 2.0 ** -8, 1 + 3 * 2.0 ** -8, 1 + 2.0 ** -8 + 2.0 ** -20, -1.7,
                    3.4e38, -3.4e38, 3.3e38, np.inf, -np.inf, np.nan, 1e-38, 1e-40, -3e-45],
                   np.float32)


@pytest.mark.parametrize("count", [0, 1, LANES - 1, LANES, LANES + 1, 3 * LANES + 2, 1000])
@pytest.mark.parametrize("zeros", [0, 1, LANES, 2 * LANES + 1])
def test_rounding_is_to_nearest_even_and_writes_what_it_should(count, zeros):
    rng = np.random.default_rng(count)
    x = rng.integers(0, 1 << 32, count, np.uint32).view(np.float32)
    x[:len(SPECIAL)] = SPECIAL[:count]
    y = np.full(count + zeros + 64, POISON, np.uint16)
    round_all(x, y, count, count + zeros)
    found = y[:count].view(ml_dtypes.bfloat16).astype(np.float32)
    with np.errstate(invalid="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    if not dot_units.missing(dot_units.AVX512_BF16):    # which takes for 0 what is below 2 ** -126
        expected[np.abs(x) < 2.0 ** -126] *= 0
    np.testing.assert_array_equal(found, expected)
    assert (y[count:count + zeros] == 0).all()
    assert (y[count + zeros:] == POISON).all()


@pytest.mark.parametrize("count", [0, 1, LANES - 1, LANES, 3 * LANES + 2])
@pytest.mark.parametrize("zeros", [0, 1, 2 * LANES + 1])
def test_what_is_bfloat16_is_copied(count, zeros):
    x = np.random.default_rng(count).integers(0, 1 << 16, count, np.uint16)
    y = np.full(count + zeros + 64, POISON, np.uint16)
    round_all(x, y, count, count + zeros)
    assert (y[:count] == x).all()
    assert (y[count:count + zeros] == 0).all()
    assert (y[count + zeros:] == POISON).all()


def test_a_nan_of_any_payload_stays_one():
    x = np.array([0x7F800001, 0xFF80FFFF, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    y = np.zeros(4, np.uint16)
    round_all(x, y, 4, 4)
    assert np.isnan(y.view(ml_dtypes.bfloat16).astype(np.float32)).all()


# Compiles the convolution for another CPU, which need not be there, and prints its machine code.
COMPILE = """
import json, sys
from numba import types, typeof
from kernels.cpu import dot_conv, scalar
from kernels.cpu.host import unit_choice
floats, bias, bits, codes, weights, numbers, table = (
    types.Array(kind, dimensions, "C") for kind, dimensions in (
        (types.float32, 1), (types.float32, 2), (types.uint16, 1), (types.uint8, 1),
        (types.int8, 1), (types.int64, 1), (types.int64, 2)))
unit = getattr(unit_choice, sys.argv[1])[sys.argv[2]]
activation = typeof(getattr(scalar, sys.argv[3])) if sys.argv[3:] else types.int64
x, w, sums = (codes, weights, types.Array(types.int32, 1, "C")) if unit.is_int8 else (
    bits, bits, floats)
dot_conv.conv_units.compile((
    *[types.int64] * 3, typeof(unit), activation, x, w, bias, x, x, types.int64,
    numbers, types.int64, x, sums, numbers, types.int64, types.int64, table, table, table,
    table, types.int64, types.float32, types.float32, types.int64, *[types.float32] * 3))
code = next(iter(dot_conv.conv_units.inspect_asm().values()))
print(json.dumps({"code": code, "missing": unit_choice.missing(unit)}))
"""


def compiled(family, unit, cpu, features, cache, lanes=16, activation=()):
    """The blocks of the kernel's machine code for a CPU, each up to the next label. activation: the
    name of a function of scalar.py, if there is to be one."""
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features,
                   "CNN_SIMD_LANES": str(lanes), "CNN_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", COMPILE, family, unit, *activation],
                          cwd=Path(__file__).parent.parent, env=environment, capture_output=True,
                          text=True, check=True)
    result = json.loads(done.stdout)
    assert result["missing"] == []
    if lanes == 16:         # what is written is rounded
        rounds = {"BF16": "vcvtneps2bf16", "INT8": "vp(movdb|ackuswb)"}[family]
        assert re.search(rounds, result["code"])
    return re.split(r"^\.\w+:$", result["code"], flags=re.MULTILINE)


@pytest.mark.parametrize(("family", "features", "multiply", "write"), [
    ("BF16", "+amx-tile,+amx-bf16,+avx512bf16", "tdpbf16ps", "vcvtneps2bf16"),
    ("INT8", "+amx-tile,+amx-int8,+avx512vnni", "tdpbusd", "vpmovdb")])
def test_tiles_compile_to_the_instructions_of_amx(family, features, multiply, write, tmp_path):
    blocks = compiled(family, "amx", "sapphirerapids", features, tmp_path)
    code = "\n".join(blocks)
    assert code.count("ldtilecfg") == code.count("tilerelease") == 1
    loops = [block for block in blocks if multiply in block]
    assert len(loops) >= 4          # 2 x 2 tiles, 2 x 1, 1 x 2, 1 x 1
    assert not [loop for loop in loops if "call" in loop]       # a callee may use the tiles
    assert any(write in loop for loop in loops)                 # sums are written meanwhile
    # The compiler keeps no tile in the stack: what is loaded and stored are operands.
    operands = re.findall(r"tile(?:loadd|stored)\s.*", code)
    assert len(operands) > 10
    assert not [operand for operand in operands if "%rsp" in operand]


def test_activations_are_vector_code_beside_the_products(tmp_path):
    blocks = compiled("BF16", "amx", "sapphirerapids", "+amx-tile,+amx-bf16,+avx512bf16", tmp_path,
                      activation=["narrow_silu"])
    code = "\n".join(blocks)
    assert re.search(r"vrcp14ps\s.*%zmm", code)         # of its reciprocal
    assert not re.search(r"vrcp14ss|vdiv", code)
    loops = "\n".join(block for block in blocks if "tdpbf16ps" in block)
    assert "vrcp14ps" in loops
    assert "call" not in loops


@pytest.mark.parametrize(("family", "unit", "cpu", "features", "multiply"), [
    ("BF16", "avx512", "cooperlake", "+avx512bf16", "vdpbf16ps"),
    ("BF16", "avx512", "znver4", "+avx512bf16", "vdpbf16ps"),
    ("INT8", "vnni", "cascadelake", "+avx512vnni", "vpdpbusd"),
    ("INT8", "vnni", "znver4", "+avx512vnni", "vpdpbusd")])
def test_vectors_compile_to_one_instruction_and_stay_in_registers(family, unit, cpu, features,
                                                                  multiply, tmp_path):
    blocks = compiled(family, unit, cpu, features, tmp_path)
    loops = [block for block in blocks if multiply in block]
    rows = getattr(unit_choice, family)[unit].rows
    assert len(loops) >= 6          # three numbers of pixels, times 2 and 1 vectors
    assert any(loop.count(multiply) == rows * 2 for loop in loops)
    for line in "\n".join(loops).splitlines():
        assert not ("zmm" in line and "%rsp" in line), line


def test_narrow_vectors_stay_in_registers_too(tmp_path):
    """Four of them are 32 outputs; two pixels at a time."""
    blocks = compiled("INT8", "avxvnni", "alderlake", "+avxvnni,+avx2,+fma", tmp_path, lanes=8)
    loops = [block for block in blocks if "vpdpbusd" in block]
    assert any(loop.count("vpdpbusd") % (2 * 4) == 0 for loop in loops)
    code = "\n".join(loops)
    assert "zmm" not in code
    assert not [line for line in code.splitlines() if "ymm" in line and "%rsp" in line]


def test_what_avx2_multiplies_stays_in_its_16_registers(tmp_path):
    """6 x 2 of sums, two of weights, a pixel and products: LLVM would load all pixels first."""
    blocks = compiled("INT8", "avx2", "haswell", "+avx2,+fma", tmp_path, lanes=8)
    loops = [block for block in blocks if "vpmaddwd" in block]
    assert any(loop.count("vpmaddwd") == 2 * 6 for loop in loops)
    assert not [line for loop in loops for line in loop.splitlines()
                if "ymm" in line and "%rsp" in line]


@pytest.mark.parametrize(("unit", "cpu", "features", "lanes"), [
    ("amx", "sapphirerapids", "+amx-tile,+amx-int8,+avx512vnni,+avx512bw", 16),
    ("avx2", "haswell", "+avx2,+fma", 8)])
def test_rows_are_packed_by_what_there_is_for_that(unit, cpu, features, lanes, tmp_path):
    code = "\n".join(compiled("INT8", unit, cpu, features, tmp_path, lanes=lanes))
    assert "vpackuswb" in code
    assert "vpackssdw" in code
