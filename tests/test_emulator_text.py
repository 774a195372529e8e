"""What a PTX text may hold besides instructions: debug information, launch bounds, constants."""

import numpy as np
import pytest
from emulator_checks import kernel, launch

from kernels.emulator import Divergence, Emulator, ParseError

STORE = "mad.wide.u32 %d1, tid, 4, x;\nst.global.u32 [%d1], tid;"


def test_debug_information_is_skipped():
    text = kernel("{\n.loc 1 7 9, function_name $L__info1, inlined_at 1 5 3\n" + STORE + "\n}", "x")
    text += '.file 1 "a.py"\n.section .debug_str\n{\n$L__info1:\n.b8 95, 90\n.b8 0\n}\n'
    x = np.zeros(32, np.uint32)
    Emulator().launch(text, "k", 1, 32, [x])
    np.testing.assert_array_equal(x, np.arange(32))


@pytest.mark.parametrize("directive", [
    ".maxntid 64", ".maxntid 8, 8, 1", ".reqntid 64\n.minnctapersm 2"])
def test_a_block_within_the_launch_bounds(directive):
    text = kernel(STORE, "x").replace(")\n{", f")\n{directive}\n{{", 1)
    assert directive in text
    Emulator().launch(text, "k", 1, 64, [np.zeros(65, np.uint32)])
    with pytest.raises(ParseError, match="64 threads") as caught:
        Emulator().launch(text, "k", 1, 65, [np.zeros(65, np.uint32)])
    assert caught.value.kernel == "k"


def test_the_warp_size_and_a_constant_table():
    x = np.zeros(32, np.uint32)
    launch("""
        mov.u32 %r1, WARP_SZ;
        and.b32 %r2, tid, 3;
        mad.wide.u32 %d2, %r2, 2, table;
        ld.const.u16 %h1, [%d2];
        cvt.u32.u16 %r2, %h1;
        add.u32 %r1, %r1, %r2;
        mad.wide.u32 %d1, tid, 4, x;
        st.global.u32 [%d1], %r1;
    """, threads=32, module=".const .align 2 .b16 table[4] = {5, 0x10, 7};", x=x)
    np.testing.assert_array_equal(x, 32 + np.tile([5, 16, 7, 0], 8))   # the rest of a table is 0


def test_the_state_space_of_a_generic_address():
    x = np.zeros(32, np.uint32)
    launch("""
        .local .align 4 .b8 mine[4];
        mov.b64 %d1, mine;
        cvta.local.u64 %d1, %d1;
        cvt.u64.u32 %d2, shared;
        cvta.shared.u64 %d2, %d2;
        mov.b64 %d3, x;
        mov.u32 %r1, 0;
        """ + "".join(f"""
        isspacep.{space} p, %d{i};
        @p or.b32 %r1, %r1, {1 << 3 * n + i - 1};
        """ for n, space in enumerate(("local", "shared", "global")) for i in (1, 2, 3)) + """
        mad.wide.u32 %d1, tid, 4, x;
        st.global.u32 [%d1], %r1;
    """, threads=32, shared_bytes=4, x=x)
    assert set(x.tolist()) == {0b100_010_001}


@pytest.mark.parametrize("instruction", ["barrier.sync 0;", "barrier.sync 0, 64;"])
def test_threads_of_a_warp_come_to_a_barrier_one_by_one(instruction):
    body = f"""
        setp.lt.u32 p, tid, 7;
        @p bra FEW;
        {instruction}
        bra DONE;
        FEW:
        {instruction}
        DONE:
        {STORE}
    """
    x = np.zeros(64, np.uint32)
    launch(body, threads=64, x=x)
    np.testing.assert_array_equal(x, np.arange(64))
    with pytest.raises(Divergence):
        launch(body.replace("barrier.sync", "barrier.sync.aligned"), threads=64, x=x)


def test_half_of_a_warp_waits_for_itself_alone():
    x = np.zeros(32, np.uint32)
    body = f"setp.ge.u32 p, tid, 16;\n@p bra DONE;\nbar.warp.sync 0xffff;\nDONE:\n{STORE}"
    launch(body, threads=32, x=x)
    np.testing.assert_array_equal(x, np.arange(32))
