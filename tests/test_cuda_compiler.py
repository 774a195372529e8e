"""Compiling with no GPU, the cache of what was compiled, and what is said where neither helps."""
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kernels.cache import read, write
from kernels.cuda import assembler, compiler, sass, store
from kernels.cuda.compiler import Kernel, cubin, ptx, resources
from kernels.cuda.errors import CompilerMissing, CudaError
from kernels.cuda.host import elementwise
from kernels.cuda.sources import source_hash

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cold(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CNN_CUBINS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def kernel():
    """The quickest to compile."""
    return elementwise.flat_kernel("float32", "clip")


def no_compiler(monkeypatch):
    def refuse(*args):
        raise AssertionError("compiled")
    monkeypatch.setattr(compiler, "compile_ptx", refuse)
    monkeypatch.setattr(compiler, "assemble", refuse)


def test_ptx_and_cubin_come_from_the_cache_the_second_time(cold, kernel, monkeypatch):
    first = ptx(kernel), cubin(kernel, "sm_90a"), resources(kernel, "sm_90a")
    assert ".target sm_75" in first[0]
    assert f".entry {kernel.name}(" in first[0]
    assert first[1].startswith(b"\x7fELF")
    no_compiler(monkeypatch)
    assert (ptx(kernel), cubin(kernel, "sm_90a"), resources(kernel, "sm_90a")) == first


@pytest.mark.parametrize("damage", [
    lambda contents: b"", lambda contents: contents[:len(contents) // 2],
    lambda contents: contents[:-1], lambda contents: b"X" + contents[1:],
    lambda contents: contents + b" "])
def test_a_torn_file_is_compiled_anew(cold, kernel, damage):
    whole = cubin(kernel, "sm_80")
    path = store.folder() / compiler.file_name(kernel, "sm_80.cubin")
    path.write_bytes(damage(path.read_bytes()))
    assert cubin(kernel, "sm_80") == whole
    assert read(path) == whole


def compile_one(start):
    start.wait()
    return cubin(elementwise.flat_kernel("float32", "clip"), "sm_80")


def test_processes_may_compile_the_same_kernel_at_once(cold, kernel):
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(4) as pool:
        start = manager.Event()
        waiting = pool.map_async(compile_one, [start] * 4)
        start.set()
        found = waiting.get(timeout=120)
    assert found == [cubin(kernel, "sm_80")] * 4
    assert [path for path in store.folder().iterdir() if path.suffix == ".tmp"] == []


def test_a_write_that_fails_leaves_nothing(cold, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write(cold / "kernel.ptx", b"text")
    assert list(cold.iterdir()) == []


def test_a_cache_that_can_not_be_written_is_said_and_does_no_harm(tmp_path, kernel, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="can not be written .* Set CNN_CACHE_DIR"):
        assert ".entry" in ptx(kernel)


def test_another_compiler_has_another_folder(cold, monkeypatch):
    before = store.folder()
    monkeypatch.setattr(store, "compiler_hash", lambda: "another")
    assert store.folder() != before


def test_an_edit_concerns_the_kernels_whose_file_imports_the_edited_one(tmp_path, monkeypatch):
    for name, text in {"a": "from .b import f", "b": "from . import c", "c": "", "d": ""}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setitem(sys.modules, "fake_a", SimpleNamespace(__file__=str(tmp_path / "a.py")))
    hashes = []
    for edited in ("none", "a", "b", "c", "d"):
        path = tmp_path / f"{edited}.py"
        path.write_text((path.read_text() if path.exists() else "") + "\n# an edit")
        source_hash.cache_clear()
        hashes.append(source_hash("fake_a"))
    assert len(set(hashes)) == 4
    assert hashes[-1] == hashes[-2]
    source_hash.cache_clear()


def test_kernels_that_differ_have_files_of_their_own(kernel):
    names = {compiler.file_name(found, "ptx") for found in (
        kernel, elementwise.flat_kernel("float32", "silu"),
        Kernel(kernel.name, kernel.make, kernel.config, kernel.signature, 128),
        Kernel(kernel.name, kernel.make, ("float32", "add"), kernel.signature, kernel.threads))}
    assert len(names) == 4


def test_shipped_cubins_need_no_compiler(cold, kernel, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    code = cubin(kernel, "sm_90a")
    write(shipped / compiler.file_name(kernel, "sm_90a.cubin"), code)
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path / "another"))
    monkeypatch.setenv("CNN_CUBINS", str(shipped))
    no_compiler(monkeypatch)
    assert cubin(kernel, "sm_90a") == code


def test_no_assembler_and_no_cubin(cold, kernel, monkeypatch):
    ptx(kernel)
    monkeypatch.setattr(assembler, "find_tool", lambda name: None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(CompilerMissing, match=r"neither ptxas nor nvJitLink .*"
                                              r"pip install 'numba-cnn\[compiler\]'"):
        cubin(kernel, "sm_90a")


def test_no_compiler_and_no_ptx(cold, kernel, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba.cuda.cudadrv.nvvm", None)
    monkeypatch.delattr("numba.cuda.cudadrv.nvvm")
    with pytest.raises(CompilerMissing, match=r"must be compiled, and the CUDA compiler can not"):
        ptx(kernel)


def test_without_numba_cuda_the_import_says_what_to_install():
    code = ("import importlib.util as u; real = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'numba_cuda' else real(name, *a)\n"
            "import kernels.cuda.backend")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          check=False)
    assert done.returncode == 1
    assert "CompilerMissing: the CUDA kernels are compiled by numba-cuda" in done.stderr


@pytest.mark.parametrize(("arch", "message"), [
    ("9.0", "is not an architecture; write it as sm_80 or sm_90a"),
    ("sm_70", "needs a GPU of sm_75 or newer and this one is sm_70"),
])
def test_architectures_are_checked(kernel, arch, message):
    with pytest.raises(CudaError, match=message):
        cubin(kernel, arch)


@pytest.mark.parametrize("complaint", [
    "ptxas kernel.ptx, line 1; fatal   : Unsupported .version 9.0; current version is '8.4'",
    "ptxas fatal   : Value 'sm_120' is not defined for option 'gpu-name'"])
def test_an_assembler_that_is_too_old_is_named_with_what_to_install(tmp_path, monkeypatch,
                                                                    complaint):
    tool = tmp_path / "ptxas"
    tool.write_text(f"""#!/bin/sh
if [ "$1" = --version ]; then echo 'Cuda compilation tools, release 12.4, V12.4.131'; exit; fi
echo "{complaint}" >&2
exit 255
""")
    tool.chmod(0o755)
    monkeypatch.setattr(assembler, "find_tool", lambda name: str(tool))
    with pytest.raises(CudaError) as caught:
        assembler.assemble(".version 9.0", "sm_90a")
    assert str(caught.value) == (f"ptxas 12.4, {tool}, refused a kernel for sm_90a: {complaint}. "
                                 f"It is too old for these kernels: {assembler.HINT}")


def test_ptx_that_is_refused_is_said():
    with pytest.raises(CudaError, match=r"ptxas \d+\.\d+, .*, refused a kernel for sm_80: "
                                        r"(.|\n)*(error|fatal)"):
        assembler.assemble("this is not PTX", "sm_80")


def test_nvjitlink_assembles_too(kernel, monkeypatch):
    monkeypatch.setattr(assembler, "find_tool", lambda name: None)
    code, log = assembler.assemble(ptx(kernel), "sm_80")
    assert code.startswith(b"\x7fELF")
    assert "registers" in log
    with pytest.raises(CudaError, match="nvJitLink refused"):
        assembler.assemble("this is not PTX", "sm_80")


def test_loops_of_constant_length_are_unrolled():
    text = ("define void @f() {\nentry:\n  br label %body\nbody:\n  br label %body\n}\n"
            "!7 = !{}\n")
    marked = compiler.unroll_loops(text)
    assert "  br label %body\nbody:\n  br label %body, !llvm.loop !8\n" in marked
    assert '!9 = !{ !"llvm.loop.unroll.full" }' in marked


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
.L_x_0:
        /*0020*/              @!P0 HMMA.16816.F32 R4, R8, R6, R4 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
        /*0070*/              @!PT LDS RZ, [RZ] ;
"""


def test_machine_code_is_read():
    counts = [(i.address, i.opcode) for i in sass.instructions(SASS)]
    assert (0x10, "LDG.E.128") in counts
    assert counts[-1] == (0x60, "BRA")                      # the padding is left out
    assert sass.loops(SASS) == [(0x10, 0x40), (0x20, 0x30)]     # the trap at the end is none


RARE = """
.L_x_0:
        /*0000*/              @!P3 BRA `(.L_x_2) ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   HMMA.16816.F32 R4, R8, R6, R4 ;
        /*0050*/               @P2 BRA `(.L_x_0) ;
"""


def test_the_common_path_of_a_loop_jumps_over_a_rare_one(monkeypatch):
    assert sass.loops(RARE) == [(0x00, 0x50), (0x20, 0x30)]
    assert [i.address for i in sass.common_path(RARE, sass.loops(RARE)[0])] == [
        0x00, 0x10, 0x40, 0x50]
    monkeypatch.setattr(sass, "disassemble", lambda cubin: RARE)
    counts = sass.loop_opcodes(b"", "HMMA")
    assert (sass.number(counts, "HMMA"), counts.total()) == (1, 4)


def test_nvdisasm_missing(monkeypatch):
    monkeypatch.setattr(sass, "find_tool", lambda name: None)
    with pytest.raises(CompilerMissing, match="pip install nvidia-cuda-nvdisasm"):
        sass.opcodes(b"")


def test_tools_are_found_in_the_wheels_first(tmp_path, monkeypatch):
    for folder in ("site/nvidia/cu13/bin", "path"):
        tool = tmp_path / folder / "ptxas-test"
        tool.parent.mkdir(parents=True)
        tool.write_text("")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assembler.find_tool.cache_clear()
    assert assembler.find_tool("ptxas-test") == str(tmp_path / "path" / "ptxas-test")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assembler.find_tool.cache_clear()
    assert "site" in assembler.find_tool("ptxas-test")
    assembler.find_tool.cache_clear()
