"""Calls of functions that the PTX text defines."""

import numpy as np
import pytest

from kernels.emulator import Emulator, UnknownInstruction

TEXT = """
.version 8.0
.target sm_80
.address_size 64
.extern .func (.param .b32 result) outside (.param .b32 a);
.func (.param .b32 result) square_plus (.param .b32 a, .param .b32 b)
{
    .reg .b32 %r<4>;
    ld.param.u32 %r1, [a];
    ld.param.u32 %r2, [b];
    mad.lo.u32 %r3, %r1, %r1, %r2;
    st.param.b32 [result+0], %r3;
    ret;
}
.func (.param .align 8 .b8 result[8]) twice (.param .b32 a)
{
    .reg .pred %p<2>;
    .reg .b32 %r<5>;
    ld.param.u32 %r1, [a];
    setp.gt.u32 %p1, %r1, 9;
    @%p1 bra LARGE;
    {
        .param .b32 param0;
        st.param.b32 [param0+0], %r1;
        .param .b32 param1;
        st.param.b32 [param1+0], 1;
        .param .b32 retval0;
        call.uni (retval0), square_plus, (param0, param1);
        ld.param.b32 %r2, [retval0+0];
    }
    bra DONE;
    LARGE:
    mov.u32 %r2, 0;
    DONE:
    st.param.b32 [result+0], %r2;
    st.param.b32 [result+4], %r1;
}
.func endless () { call endless; ret; }
.visible .entry k(.param .u64 p_y, .param .u32 p_n)
{
    .reg .pred %p<3>;
    .reg .b32 %r<9>;
    .reg .b64 %d<3>;
    mov.u32 %r1, %tid.x;
    ld.param.u32 %r7, [p_n];
    ld.param.u64 %d1, [p_y];
    mul.wide.u32 %d2, %r1, 4;
    add.s64 %d1, %d1, %d2;
    mov.u32 %r5, 7;
    setp.ge.u32 %p1, %r1, %r7;
    @%p1 bra END;
    {
        .param .b32 param0;
        st.param.b32 [param0+0], %r1;
        .param .align 8 .b8 retval0[8];
        call (retval0), twice, (param0);
        ld.param.v2.b32 {%r3, %r4}, [retval0+0];
    }
    add.u32 %r5, %r3, %r4;
    {
        .param .b32 param0;
        st.param.b32 [param0+0], %r5;
        .param .b32 retval0;
        setp.eq.u32 %p2, %r1, 3;
        @%p2 call (retval0), square_plus, (param0, param0);
        @%p2 ld.param.b32 %r5, [retval0+0];
    }
    END:
    st.global.u32 [%d1], %r5;
    // more
    ret;
}
"""


def expected(threads, n):
    y = np.full(threads, 7)
    for i in range(min(threads, n)):
        y[i] = (i * i + 1 if i <= 9 else 0) + i
        if i == 3:
            y[i] = y[i] * y[i] + y[i]
    return y


@pytest.mark.parametrize("schedule", [{}, {"seed": 1}, {"seed": 2}])
@pytest.mark.parametrize("n", [0, 5, 32, 40, 64])
def test_functions_with_branches_and_nested_calls(n, schedule):
    y = np.zeros(64, np.uint32)
    Emulator(**schedule).launch(TEXT, "k", 1, 64, [y, n])
    np.testing.assert_array_equal(y, expected(64, n))


def test_a_thread_finds_back_to_the_place_that_it_came_from():
    """Half of a warp calls from one place, half from another."""
    text = TEXT.replace("// more", """
        and.b32 %r6, %r1, 1;
        setp.eq.u32 %p1, %r6, 0;
        @%p1 bra EVEN;
        {
            .param .b32 param0;
            st.param.b32 [param0+0], %r1;
            .param .b32 retval0;
            call (retval0), square_plus, (param0, param0);
            ld.param.b32 %r8, [retval0+0];
        }
        bra STORE;
        EVEN:
        {
            .param .b32 param0;
            st.param.b32 [param0+0], 100;
            .param .b32 retval0;
            call (retval0), square_plus, (param0, param0);
            ld.param.b32 %r8, [retval0+0];
        }
        STORE:
        st.global.u32 [%d1], %r8;
    """)
    y, i = np.zeros(64, np.uint32), np.arange(64)
    Emulator().launch(text, "k", 1, 64, [y, 5])
    np.testing.assert_array_equal(y, np.where(i % 2, i * i + i, 10100))


@pytest.mark.parametrize("call", [
    "call endless;", "call missing;", "call.uni outside;", "call %d1, ();"])
def test_what_cannot_be_called_is_refused_when_it_would_run(call):
    y = np.zeros(64, np.uint32)
    text = TEXT.replace("// more", f"setp.gt.u32 %p1, %r7, 99;\n@%p1 {call}")
    Emulator().launch(text, "k", 1, 64, [y, 5])
    with pytest.raises(UnknownInstruction, match="calls a function"):
        Emulator().launch(text, "k", 1, 64, [y, 100])
