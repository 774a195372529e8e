"""What a caller sees of the emulator: arrays and their aliases, scalars, shapes, seeds, errors."""
import numpy as np
import pytest
from emulator_checks import BLOCK_NUMBER, kernel, launch
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from kernels.emulator import (
    Empty,
    Emulator,
    EmulatorError,
    OutOfBounds,
    ParseError,
    Stats,
    UninitialisedRead,
)

ADD_ONE = """
    mad.wide.u32 %d1, tid, 4, x;
    mad.wide.u32 %d2, tid, 4, y;
    ld.global.u32 %r1, [%d1];
    add.u32 %r1, %r1, 1;
    st.global.u32 [%d2], %r1;
"""


# ------------------------------------------------------------------------------------------ arrays

def test_an_array_may_be_given_twice():
    x = np.arange(32, dtype=np.uint32)
    launch(ADD_ONE, x=x, y=x)
    assert x.tolist() == list(range(1, 33))


def test_views_of_one_arena_are_one_memory():
    arena = np.zeros(256, np.uint8)
    x, y = arena[:128].view(np.uint32), arena[128:].view(np.uint32)
    x[:] = np.arange(32)
    launch(ADD_ONE, x=x, y=y)
    assert arena.view(np.uint32).tolist() == [*range(32), *range(1, 33)]
    launch(ADD_ONE, x=y, y=x)
    assert arena.view(np.uint32).tolist() == [*range(2, 34), *range(1, 33)]


@given(st.integers(0, 24), st.integers(0, 24), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_overlapping_views_behave_as_in_numpy(start_x, start_y, count):
    """One thread copies element after element, so what it has written it may read again."""
    arena = np.arange(32, dtype=np.uint32) ** 2
    expected = arena.copy()
    for i in range(count):
        expected[start_y + i] = expected[start_x + i] + 1
    launch(f"mov.u32 tid, 0;\nNEXT:\n{ADD_ONE}\nadd.u32 tid, tid, 1;\n"
           f"setp.lt.u32 p, tid, {count};\n@p bra NEXT;", threads=1,
           x=arena[start_x:start_x + count], y=arena[start_y:start_y + count])
    np.testing.assert_array_equal(arena, expected)


def test_a_view_ends_where_it_ends():
    """What lies beside a view in the host's memory is out of its bounds."""
    arena = np.zeros(96, np.uint32)
    launch(ADD_ONE, x=arena[:32], y=arena[64:])
    with pytest.raises(OutOfBounds):
        launch(ADD_ONE, x=arena[:31], y=arena[64:])
    with pytest.raises(OutOfBounds):
        launch(ADD_ONE, x=arena[:32], y=arena[65:])
    assert (arena[:64] == 0).all()
    with pytest.raises(OutOfBounds):        # not even where the next one begins at once
        launch(ADD_ONE, threads=33, x=arena[:32], y=arena[32:])


def test_only_what_a_kernel_stores_changes():
    x = np.arange(32, dtype=np.uint32)
    x.flags.writeable = False
    y = np.full(40, 7, np.uint32)
    launch(ADD_ONE, x=x, y=y)
    assert y.tolist() == [*range(1, 33), *[7] * 8]


def test_a_read_only_view_of_what_another_argument_may_write():
    arena = np.zeros(32, np.uint32)
    x = arena[:]
    x.flags.writeable = False
    launch(ADD_ONE, x=x, y=arena)
    assert (arena == 1).all()


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.float16, bfloat16, np.int32, np.float32,
                                   np.int64, np.complex64, np.bool_])
@pytest.mark.parametrize("shape", [(256,), (4, 64), (2, 2, 2, 32), (256, 1)])
def test_arrays_of_any_dtype_and_shape(shape, dtype):
    x = (np.arange(256) % 100).astype(dtype).reshape(shape)
    y = np.zeros_like(x)
    launch("mul.wide.u32 %d3, tid, 1;\nadd.s64 %d1, %d3, x;\nadd.s64 %d2, %d3, y;\n"
           "ld.global.u8 %h1, [%d1];\nst.global.u8 [%d2], %h1;", threads=256,
           blocks=1, x=x, y=y)
    np.testing.assert_array_equal(y.reshape(-1).view(np.uint8)[:256],
                                  x.reshape(-1).view(np.uint8)[:256])


def test_an_array_without_elements_has_no_bytes():
    y = np.zeros(32, np.uint32)
    launch("setp.gt.u32 p, tid, 99;\n@p ld.global.u32 %r1, [x];\n"
           "mad.wide.u32 %d2, tid, 4, y;\nst.global.u32 [%d2], 1;", x=np.zeros(0, np.uint32), y=y)
    assert (y == 1).all()
    with pytest.raises(OutOfBounds):
        launch("ld.global.u32 %r1, [x];", x=np.zeros(0, np.uint32), y=y)


@pytest.mark.parametrize("schedule", [{}, {"seed": 1}], ids=["lockstep", "random"])
def test_nothing_changes_on_the_host_when_a_kernel_is_refused(schedule):
    x, y = np.arange(64, dtype=np.uint32), np.full(63, 7, np.uint32)
    with pytest.raises(EmulatorError):
        launch(ADD_ONE, threads=64, schedule=schedule, x=x, y=y)
    assert (y == 7).all()
    assert x.tolist() == list(range(64))


# ------------------------------------------------------------------------------------------- empty

def test_an_empty_array_keeps_what_was_written_for_the_next_launch():
    workspace, y = np.zeros(64, np.uint32), np.zeros(32, np.uint32)
    launch(ADD_ONE, x=np.arange(32, dtype=np.uint32), y=Empty(workspace))
    launch(ADD_ONE, x=Empty(workspace), y=y)
    assert y.tolist() == list(range(2, 34))
    with pytest.raises(UninitialisedRead):
        launch(ADD_ONE, threads=33, x=Empty(workspace), y=np.zeros(33, np.uint32))


def test_views_of_an_empty_workspace():
    workspace, y = np.zeros(512, np.uint8), np.zeros(32, np.uint32)
    first, second = workspace[:128].view(np.uint32), workspace[256:384].view(np.uint32)
    launch(ADD_ONE, x=np.arange(32, dtype=np.uint32), y=Empty(first))
    launch(ADD_ONE, x=Empty(first), y=Empty(second))
    launch(ADD_ONE, x=Empty(second), y=y)
    assert y.tolist() == list(range(3, 35))
    with pytest.raises(UninitialisedRead):
        launch(ADD_ONE, x=Empty(workspace[128:256].view(np.uint32)), y=y)


def test_a_fresh_array_is_empty_again():
    for _ in range(3):
        workspace = np.zeros(32, np.uint32)
        with pytest.raises(UninitialisedRead):
            launch(ADD_ONE, x=Empty(workspace), y=np.zeros(32, np.uint32))
        launch(ADD_ONE, x=np.zeros(32, np.uint32), y=Empty(workspace))


def test_an_array_that_is_not_marked_empty_has_its_content():
    workspace, y = np.ones(32, np.uint32), np.zeros(32, np.uint32)
    launch(ADD_ONE, x=workspace, y=y)
    assert (y == 2).all()


# ------------------------------------------------------------------------------- grids and scalars

COUNT = BLOCK_NUMBER + """
    mad.wide.u32 %d1, %r1, 4, y;
    red.global.add.u32 [%d1], 1;
"""


@pytest.mark.parametrize(("blocks", "threads"), [
    (1, 1), (7, 33), ((7,), (33,)), ((2, 3), (4, 5)), ((2, 3, 4), (3, 4, 5)), (1, (1, 1, 64)),
    (200, 64), (np.int64(3), (np.int32(8), 1, 1)), ([2, 2], 32)], ids=str)
def test_grids_and_blocks_are_numbers_or_up_to_three_of_them(blocks, threads):
    y = np.zeros(int(np.prod(blocks)) + 1, np.uint32)
    launch(COUNT, blocks=blocks, threads=threads, y=y)
    assert (y[:-1] == np.prod(threads)).all()
    assert y[-1] == 0


SCALARS = """.version 9.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 y, .param .{type} value)
{{
.reg .b64 %d1;
.reg .{register} %v;
ld.param.u64 %d1, [y];
ld.param.{type} %v, [value];
st.global.{type} [%d1], %v;
ret;
}}
"""


@pytest.mark.parametrize(("kind", "register", "dtype", "values"), [
    ("u8", "b16", np.uint8, [0, 255]), ("s16", "b16", np.int16, [-2 ** 15, 2 ** 15 - 1]),
    ("u32", "b32", np.uint32, [0, 2 ** 32 - 1, np.uint32(7), np.int64(7), True]),
    ("s32", "b32", np.int32, [-2 ** 31, 2 ** 31 - 1]),
    ("b32", "b32", np.int32, [-1, 5]),
    ("u64", "b64", np.uint64, [0, 2 ** 64 - 1]), ("s64", "b64", np.int64, [-2 ** 63]),
    ("f32", "f32", np.float32, [1.5, -0.1, np.float32(0.1), np.inf, 3, np.float64(2.5)]),
    ("f64", "f64", np.float64, [0.1, 1e300, 7])])
def test_scalars_of_every_type(kind, register, dtype, values):
    text = SCALARS.format(type=kind, register=register)
    for value in values:
        y = np.zeros(1, dtype)
        Emulator().launch(text, "k", 1, 1, [y, value])
        assert y[0] == dtype(value)


def test_arrays_are_expanded_as_numba_passes_them():
    """meminfo, parent, number of elements, bytes of one, data, shape ..., strides ..."""
    names = ["meminfo", "parent", "size", "itemsize", "data", "rows", "columns", "row_stride",
             "column_stride", "scale"]
    text = kernel("\n".join(
        f"st.global.u64 [data+{8 * i}], {name};" for i, name in enumerate(names)), *names)
    x = np.zeros((4, 3), np.float64)
    Emulator().launch(text, "k", 1, 1, [x, 12345])
    found = x.reshape(-1).view(np.uint64).tolist()[:10]
    assert found[:4] == [0, 0, 12, 8]
    assert found[5:] == [4, 3, 24, 8, 12345]


# ------------------------------------------------------------------------ schedules, results, text

def test_a_seed_gives_the_same_order_again():
    """The order in which threads draw numbers from a counter depends on the seed alone."""
    def draw(seed):
        count, y = np.zeros(1, np.uint32), np.zeros(512, np.uint32)
        launch("""
            atom.global.add.u32 %r1, [count], 1;
            mov.u32 %r2, %ctaid.x;
            mad.lo.u32 %r2, %r2, 128, tid;
            mad.wide.u32 %d1, %r2, 4, y;
            st.global.u32 [%d1], %r1;""", threads=128, blocks=4, schedule={"seed": seed},
               count=count, y=y)
        assert sorted(y.tolist()) == list(range(512))
        return y.tolist()

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(4)}) > 1


def test_what_a_launch_tells():
    stats = launch(ADD_ONE, threads=64, blocks=3, x=np.zeros(64, np.uint32),
                   y=np.zeros(64, np.uint32))
    assert isinstance(stats, Stats)
    assert stats.waves >= 1
    assert stats.steps >= 5
    assert stats.warp_instructions >= 5 * 2 * 3


def test_one_text_may_hold_several_kernels():
    text = kernel("st.global.u32 [y], 1;", "y", name="one")
    text += text[text.index(".visible"):].replace("one", "two").replace("[y], 1", "[y], 2")
    for name, value in (("one", 1), ("two", 2)):
        y = np.zeros(1, np.uint32)
        Emulator().launch(text, name, 1, 1, [y])
        assert y[0] == value


def test_comments_and_directives_are_skipped():
    y = np.zeros(1, np.uint32)
    text = kernel("""
        .pragma "nounroll";
        /* a comment
           of two lines; ret; */
        .loc 1 5 0
        st.global.u32 [y], 3;       // and one more; ret;
        """, "y").replace(") \n{", ")\n{").replace(
            ".visible", '.file 1 "kernel.py"\n.visible').replace(
            "p_y)\n", "p_y)\n.maxntid 32, 1, 1\n.minnctapersm 2\n")
    Emulator().launch(text, "k", 1, 1, [y])
    assert y[0] == 3


@pytest.mark.parametrize("bounds", [".maxntid 32, 2, 1", ".reqntid 64", ".maxntid 64"])
def test_launch_bounds_are_kept(bounds):
    y = np.zeros(1, np.uint32)
    text = kernel("red.global.add.u32 [y], 1;", "y").replace("p_y)", f"p_y)\n{bounds}")
    Emulator().launch(text, "k", 1, 64, [y])
    assert y[0] == 64
    with pytest.raises(ParseError, match="65"):
        Emulator().launch(text, "k", 1, 65, [y])


def test_an_emulator_can_be_used_again_after_an_error():
    emulator, y = Emulator(), np.zeros(1, np.uint32)
    with pytest.raises(EmulatorError):
        emulator.launch(kernel("st.global.u32 [y+4], 1;", "y"), "k", 1, 1, [y])
    emulator.launch(kernel("st.global.u32 [y], 1;", "y"), "k", 1, 1, [y])
    assert y[0] == 1
