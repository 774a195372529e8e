"""Bulk and tensor copies (TMA): boxes, borders, swizzles, im2col, stores."""
import itertools

import numpy as np
import pytest
from emulator_checks import every_schedule, integers, kernel, launch, mutated, refused

from kernels.emulator import (
    AsyncNotWaited,
    Deadlock,
    Empty,
    Emulator,
    EmulatorError,
    Race,
    TensorMap,
    UninitialisedRead,
)

# One thread starts the copy of `bytes` bytes to `shared`, all wait for it and dump it.
LOAD = """
    add.u32 %r20, shared, {bytes};
    setp.ne.u32 %p1, tid, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r20], 1;
    fence.proxy.async.shared::cta;
    READY:
    bar.sync 0;
    @%p1 bra WAIT;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], {bytes};
    {copy}
    WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r20], 0;
    @!%p2 bra WAIT;
"""
DUMP = """
    mad.lo.u32 %r1, tid, 16, shared;
    mad.wide.u32 %d1, tid, 16, y;
    ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [%r1];
    st.global.v4.u32 [%d1], {%r2, %r3, %r4, %r5};
"""
TILED = ("cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
         "[shared], [x, {{{at}}}], [%r20];")
IM2COL = ("cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
          "[shared], [x, {{{at}}}], [%r20], {{%h1, %h2}};")


def loaded(copy, source, expected, schedule):
    """What `copy` brings to shared memory, in the dtype and shape of `expected`."""
    size = expected.nbytes
    y = np.zeros(size, np.uint8)
    launch(LOAD.format(bytes=size, copy=copy) + DUMP, threads=size // 16, shared_bytes=size + 8,
           schedule=schedule, x=source, y=y)
    return y.view(expected.dtype).reshape(expected.shape)


def swizzled(box, span):
    """16-byte chunk c of 128-byte line l moves to c ^ (l modulo 8, 4 or 2)."""
    chunks = np.ascontiguousarray(box).view(np.uint8).reshape(-1, 16)
    result = np.empty_like(chunks)
    for i, chunk in enumerate(chunks):
        result[i ^ i // 8 % (span // 16) if span else i] = chunk
    return result.view(box.dtype).reshape(box.shape)


def box_of(x, at, shape, strides=None):
    """The box of this shape at these indices, zero outside of x; all outermost first."""
    result = np.zeros(shape, x.dtype)
    for place in itertools.product(*map(range, shape)):
        index = tuple(a + p * s for a, p, s in zip(at, place, strides or (1,) * x.ndim,
                                                   strict=True))
        if all(0 <= i < n for i, n in zip(index, x.shape, strict=True)):
            result[place] = x[index]
    return result


def coordinates(at):
    return ", ".join(map(str, at[::-1]))


@every_schedule
@pytest.mark.parametrize(("shape", "box", "at"), [
    ((1000,), (64,), (960,)),
    ((20, 40), (32, 32), (-3, 24)),
    ((6, 7, 16), (4, 4, 16), (4, -1, 0)),
    ((5, 6, 7, 32), (2, 4, 4, 32), (4, -2, 5, 0)),
    ((3, 4, 5, 6, 8), (2, 2, 2, 2, 8), (2, -1, 4, 5, 0)),
])
def test_a_box_is_cut_out_and_zero_beyond_the_border(shape, box, at, schedule):
    x = integers(32, seed=1, count=int(np.prod(shape))).reshape(shape)
    expected = box_of(x, at, box)
    copy = TILED.format(rank=len(shape), at=coordinates(at))
    source = TensorMap(x, box[::-1], swizzle=0)
    np.testing.assert_array_equal(loaded(copy, source, expected, schedule), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("span", [0, 32, 64, 128])
def test_a_swizzle_moves_chunks_inside_a_line(span, dtype):
    width = (span or 64) // np.dtype(dtype).itemsize
    x = np.arange(20 * 2 * width).reshape(20, 2 * width).astype(dtype)
    expected = box_of(x, (7, width), (16, width))
    found = loaded(TILED.format(rank=2, at=f"{width}, 7"), TensorMap(x, (width, 16), swizzle=span),
                   expected, {})
    np.testing.assert_array_equal(found, swizzled(expected, span))


def test_a_stride_takes_every_other_element():
    """The box is an extent in the array: with a stride of 2, 16 rows of it are 8."""
    x = integers(32, seed=1, count=800).reshape(20, 40)
    expected = box_of(x, (7, 8), (8, 16), (2, 1))
    found = loaded(TILED.format(rank=2, at="8, 7"),
                   TensorMap(x, (16, 16), swizzle=0, strides=(1, 2)), expected, {})
    np.testing.assert_array_equal(found, expected)


@every_schedule
@pytest.mark.parametrize("span", [0, 64])
@pytest.mark.parametrize(("padding", "stride", "at", "tap"), [
    (1, 1, (1, 3, 4, 0), (0, 2)), (1, 1, (0, -1, -1, 0), (2, 2)), (0, 1, (3, 2, 4, 0), (1, 1)),
    (1, 1, (4, 4, 2, 0), (1, 0)), (1, 2, (0, 1, 3, 0), (2, 1)), (0, 2, (2, 0, 2, 0), (0, 2))])
def test_im2col_walks_the_pixels_of_a_3x3_convolution(padding, stride, at, tap, span, schedule):
    """`at` is the first output pixel (n, h, w) as the input pixel under the filter's corner; the
    box holds 64 pixels in the order of the output, for the filter's tap (row, column)."""
    x = np.random.default_rng(1).standard_normal((5, 6, 7, 32)).astype(np.float16)
    lower, upper = -padding, padding - 2
    pixels = [(n, h, w) for n in range(32) for h in range(lower, 6 + upper, stride)
              for w in range(lower, 7 + upper, stride)]
    first = pixels.index(at[:3])
    expected = np.stack([box_of(x, (n, h + tap[0], w + tap[1], 0), (1, 1, 1, 32))
                         for n, h, w in pixels[first:first + 64]])
    copy = (f"mov.u16 %h1, {tap[1]};\nmov.u16 %h2, {tap[0]};\n"
            + IM2COL.format(at=coordinates(at)))
    source = TensorMap(x, swizzle=span, strides=(1, stride, stride, 1),
                       im2col=((lower, lower), (upper, upper), 32, 64))
    np.testing.assert_array_equal(loaded(copy, source, expected, schedule),
                                  swizzled(expected, span))


@every_schedule
def test_a_plain_bulk_copy(schedule):
    x = integers(32, seed=1, count=512)
    copy = ("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
            "[shared], [x], 1024, [%r20];")
    np.testing.assert_array_equal(loaded(copy, x, x[:256], schedule), x[:256])


STORE = """
    mad.lo.u32 %r1, tid, 16, shared;
    mad.wide.u32 %d1, tid, 16, x;
    ld.global.v4.u32 {{%r2, %r3, %r4, %r5}}, [%d1];
    st.shared.v4.u32 [%r1], {{%r2, %r3, %r4, %r5}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.u32 p, tid, 0;
    @p bra END;
    {copy}
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group{read} 0;
    END:
"""


@every_schedule
@pytest.mark.parametrize("at", [(0, 0), (12, 24), (-4, -8)])
@pytest.mark.parametrize("span", [0, 64])
def test_a_stored_box_is_clipped_at_the_border(at, span, schedule):
    x = np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
    y, expected = np.full((20, 36), 7, np.float32), np.full((20, 36), 7, np.float32)
    for row, column in np.ndindex(16, 16):
        if 0 <= row + at[0] < 20 and 0 <= column + at[1] < 36:
            expected[row + at[0], column + at[1]] = x[row, column]
    launch(STORE.format(read="", copy="cp.async.bulk.tensor.2d.global.shared::cta.bulk_group "
                        f"[y, {{{coordinates(at)}}}], [shared];"),
           threads=64, shared_bytes=1024, schedule=schedule, x=swizzled(x, span),
           y=TensorMap(y, (16, 16), swizzle=span))
    np.testing.assert_array_equal(y, expected)


@every_schedule
def test_a_plain_bulk_store(schedule):
    x, y = integers(32, seed=1, count=256), np.zeros(300, np.uint32)
    launch(STORE.format(read=".read", copy="cp.async.bulk.global.shared::cta.bulk_group [y], "
                                           "[shared], 1024;"),
           threads=64, shared_bytes=1024, schedule=schedule, x=x, y=y)
    np.testing.assert_array_equal(y[:256], x)
    assert (y[256:] == 0).all()


def test_a_tensor_map_may_be_a_parameter_of_128_bytes():
    x = integers(32, seed=1, count=1024).reshape(32, 32)
    expected = box_of(x, (4, 8), (8, 16))
    y = np.zeros_like(expected)
    text = kernel(LOAD.format(bytes=512, copy=TILED.format(rank=2, at="8, 4")) + DUMP, "x", "y")
    text = text.replace(".param .u64 p_x", ".param .align 64 .b8 p_x[128]").replace(
        "ld.param.u64 x, [p_x];", "mov.b64 x, p_x;\ncvta.param.u64 x, x;")
    Emulator().launch(text, "k", 1, 32, [TensorMap(x, (16, 8), swizzle=0), y], 520)
    np.testing.assert_array_equal(y, expected)


@every_schedule
def test_a_ring_of_tiles_is_loaded_ahead(schedule):
    """Warp 1 loads 6 tiles into 2 slots, warp 0 adds them up: full and empty barriers, TMA."""
    x = np.random.default_rng(1).integers(-99, 99, (8, 192)).astype(np.float32)
    y = np.zeros((32, 4), np.float32)
    launch("""
        add.u32 %r20, shared, 2048;            // full[2], then empty[2]
        setp.ne.u32 %p1, tid, 0;
        @%p1 bra READY;
        mbarrier.init.shared::cta.b64 [%r20], 1;
        mbarrier.init.shared::cta.b64 [%r20+8], 1;
        mbarrier.init.shared::cta.b64 [%r20+16], 32;
        mbarrier.init.shared::cta.b64 [%r20+24], 32;
        fence.proxy.async.shared::cta;
        READY:
        bar.sync 0;
        mov.u32 %r1, 0;
        mov.b32 %f1, 0f00000000; mov.b32 %f2, %f1; mov.b32 %f3, %f1; mov.b32 %f4, %f1;
        NEXT:
        and.b32 %r2, %r1, 1;                   // slot
        shr.u32 %r3, %r1, 1;
        and.b32 %r3, %r3, 1;                   // parity of the round
        mad.lo.u32 %r4, %r2, 8, %r20;
        mad.lo.u32 %r5, %r2, 1024, shared;
        setp.ge.u32 p, tid, 32;
        @p bra PRODUCER;
        FULL:
        mbarrier.try_wait.parity.shared::cta.b64 q, [%r4], %r3;
        @!q bra FULL;
        mad.lo.u32 %r6, tid, 16, %r5;
        ld.shared.v4.f32 {%f5, %f6, %f7, %f8}, [%r6];
        add.f32 %f1, %f1, %f5; add.f32 %f2, %f2, %f6; add.f32 %f3, %f3, %f7; add.f32 %f4, %f4, %f8;
        ld.shared.v4.f32 {%f5, %f6, %f7, %f8}, [%r6+512];
        add.f32 %f1, %f1, %f5; add.f32 %f2, %f2, %f6; add.f32 %f3, %f3, %f7; add.f32 %f4, %f4, %f8;
        mbarrier.arrive.shared::cta.b64 _, [%r4+16];
        bra.uni LAST;
        PRODUCER:
        setp.ne.u32 p, tid, 32;
        @p bra END;
        xor.b32 %r3, %r3, 1;
        EMPTY:
        mbarrier.try_wait.parity.shared::cta.b64 q, [%r4+16], %r3;
        @!q bra EMPTY;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], 1024;
        mul.lo.u32 %r7, %r1, 32;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
            [%r5], [x, {%r7, 0}], [%r4];
        LAST:
        add.u32 %r1, %r1, 1;
        setp.lt.u32 q, %r1, 6;
        @q bra NEXT;
        setp.ge.u32 p, tid, 32;
        @p bra END;
        mad.wide.u32 %d1, tid, 16, y;
        st.global.v4.f32 [%d1], {%f1, %f2, %f3, %f4};
        END:""", threads=64, shared_bytes=2080, schedule=schedule,
           x=TensorMap(x, (32, 8), swizzle=0), y=y)
    tiles = x.reshape(8, 6, 8, 4).sum(1).reshape(64, 4)
    np.testing.assert_array_equal(y, tiles[:32] + tiles[32:])


# ------------------------------------------------------------------------------------------ faults

TILE = LOAD.format(bytes=1024, copy=TILED.format(rank=2, at="0, 0"))


def tensor_copy(body, schedule=None):
    x = np.random.default_rng(1).standard_normal((16, 32)).astype(np.float32)
    y = np.zeros((16, 16), np.float32)
    launch(body, threads=64, shared_bytes=1032, schedule=schedule,
           x=TensorMap(x, (16, 16), swizzle=0), y=y)
    np.testing.assert_array_equal(y, x[:, :16])


WAITING = "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r20], 0;"


@pytest.mark.parametrize("schedule", [{}, {"race": False}], ids=["race", "lockstep"])
@pytest.mark.parametrize(("found", "new"), [
    (WAITING, "setp.eq.u32 %p2, 0, 0;"), (WAITING, WAITING.replace(", 0;", ", 1;")),
    ("expect_tx.shared::cta.b64 _, [%r20], 1024;", "shared::cta.b64 _, [%r20];"),
], ids=["no-wait", "wrong-parity", "no-bytes-expected"])
def test_a_tile_is_read_before_it_has_arrived(found, new, schedule):
    tensor_copy(TILE + DUMP, schedule)
    with pytest.raises((AsyncNotWaited, UninitialisedRead)):
        tensor_copy(mutated(TILE + DUMP, found, new), schedule)


@pytest.mark.parametrize("bytes_expected", [1040, 2048])
def test_more_bytes_are_expected_than_come(bytes_expected):
    with pytest.raises(Deadlock) as caught:
        tensor_copy(mutated(TILE + DUMP, "_, [%r20], 1024;", f"_, [%r20], {bytes_expected};"))
    assert str(bytes_expected - 1024) in str(caught.value)


def test_a_barrier_must_be_initialised_and_seen_by_all():
    tensor_copy(TILE + DUMP)
    with pytest.raises(EmulatorError):
        tensor_copy(mutated(TILE + DUMP, "mbarrier.init.shared::cta.b64 [%r20], 1;"))
    with pytest.raises((Race, EmulatorError)):
        tensor_copy(mutated(TILE + DUMP, "READY:\n    bar.sync 0;", "READY:"))


def test_a_slot_is_loaded_again_while_it_is_read():
    """The second copy needs a barrier after the first has been read."""
    again = """
        {}
        @%p1 bra SECOND;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 1024;
        cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
            [shared], [x, {{0, 0}}], [%r20];
        SECOND:
        mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r20], 1;
        @!%p2 bra SECOND;
        """
    tensor_copy(TILE + DUMP + again.format("bar.sync 0;") + DUMP)
    with pytest.raises(Race):
        tensor_copy(TILE + DUMP + again.format("") + DUMP)


def test_the_async_proxy_sees_generic_stores_only_after_a_fence():
    body = STORE.format(read="", copy="cp.async.bulk.global.shared::cta.bulk_group [y], "
                                      "[shared], 1024;")
    x = integers(32, seed=1, count=256)
    launch(body, threads=64, shared_bytes=1024, x=x, y=np.zeros_like(x))
    with pytest.raises(Race) as caught:
        launch(mutated(body, "fence.proxy.async.shared::cta;"), threads=64, shared_bytes=1024, x=x,
               y=np.zeros_like(x))
    assert "fence.proxy.async" in str(caught.value)


def test_a_stored_tile_is_overwritten_before_it_has_been_read():
    body = """
        setp.ne.u32 p, tid, 0;
        mad.lo.u32 %r1, tid, 16, shared;
        mov.u32 %r2, 7;
        st.shared.v4.u32 [%r1], {%r2, %r2, %r2, %r2};
        fence.proxy.async.shared::cta;
        bar.sync 0;
        @p bra STORED;
        cp.async.bulk.global.shared::cta.bulk_group [y], [shared], 1024;
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 0;
        STORED:
        bar.sync 0;
        st.shared.v4.u32 [%r1], {%r3, %r3, %r3, %r3};"""
    y = np.zeros(256, np.uint32)
    launch(body, threads=64, shared_bytes=1024, y=y)
    assert (y == 7).all()
    with pytest.raises((Race, AsyncNotWaited)):
        launch(mutated(body, "cp.async.bulk.wait_group.read 0;"), threads=64, shared_bytes=1024,
               y=y)


def test_a_tensor_copy_of_an_empty_array():
    body = LOAD.format(bytes=512, copy=TILED.format(rank=2, at="0, 0")) + DUMP
    x = integers(32, seed=1, count=256).reshape(8, 32)
    launch(body, threads=32, shared_bytes=520, x=TensorMap(x, (16, 8), swizzle=0),
           y=np.zeros(128, np.uint32))
    refused(UninitialisedRead, body, threads=32, shared_bytes=520,
            x=TensorMap(Empty(x), (16, 8), swizzle=0), y=np.zeros(128, np.uint32))
