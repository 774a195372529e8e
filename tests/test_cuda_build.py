"""Compiling ahead: the folder that is shipped, the report, and which kernels a network needs."""
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from cnn.ahead import kernels_of
from kernels.cuda import backend, build, compiler
from kernels.cuda.host import elementwise
from kernels.cuda.launch import CudaOptions

ROOT = Path(__file__).parent.parent


def run(*arguments):
    return CliRunner().invoke(build.main, [str(argument) for argument in arguments])


def test_a_folder_of_cubins_replaces_the_compiler(small_model, tmp_path, monkeypatch):
    folder = tmp_path / "cubins"
    done = run("--model", small_model, "--dtype", "float32", "--arch", "sm_80", "--arch", "sm_90a",
               "--output", folder, "--jobs", 1)
    assert done.exit_code == 0, done.output
    assert f"kernels are in {folder}; use it with CNN_CUBINS={folder}" in done.output
    monkeypatch.setenv("CNN_CUBINS", str(folder))
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(compiler, "compile_ptx", lambda kernel: pytest.fail("compiled"))
    for arch in ("sm_80", "sm_90a"):
        options = CudaOptions(dtype="float32", arch=arch,
                              multiprocessors=build.MULTIPROCESSORS[arch])
        needed = kernels_of(str(small_model), options, [1])
        assert {kernel.name.split("_")[0] for kernel in needed} >= {"conv", "global", "gemv"}
        assert all(compiler.cubin(kernel, arch) for kernel in needed)


def test_what_is_skipped_is_not_built(small_model, tmp_path):
    done = run("--model", small_model, "--dtype", "float32", "--arch", "sm_90a", "--skip", "conv_",
               "--skip", "gemv_", "--output", tmp_path, "--jobs", 1)
    assert done.exit_code == 0, done.output
    built = {path.name.split("_")[0] for path in tmp_path.iterdir()}
    assert "global" in built
    assert not built & {"conv", "gemv"}


def test_the_report_is_a_table_of_kernels_and_architectures():
    kernels = [elementwise.flat_kernel(dtype, "clip") for dtype in ("float32", "float16")]
    built = build.build(kernels, ["sm_75", "sm_90a"], jobs=1)
    head, rule, *rows = build.report(built).splitlines()
    assert head == "| kernel | threads | shared KiB | sm_75 | sm_90a |"
    assert head.count("|") == rule.count("|")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["clip_f32x4", "clip_f16x8"]
    assert cells[0][3].isdigit()
    assert cells[1][3] == ""                # float16 needs sm_80
    assert cells[1][4].isdigit()


def test_spills_and_the_density_of_the_main_loop_are_reported(monkeypatch):
    kernel = replace(elementwise.flat_kernel("float32", "clip"), name="conv_mma_f16")
    monkeypatch.setattr(build.sass, "loop_opcodes",
                        lambda cubin, opcode: build.sass.Counter({f"{opcode}.16816": 3, "BRA": 1}))
    assert build.density(elementwise.flat_kernel("float32", "clip"), b"") == ""
    built = build.Built(kernel, "sm_80", b"", compiler.Resources(255, 16, 8, 12, 0),
                        build.density(kernel, b""))
    assert "| 255, 8 + 12 B spilled, 3 HMMA of 4 |" in build.report([built])
    assert build.density(replace(kernel, name="conv_wgmma_f16"), b"") == "3 HGMMA of 4"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--arch", "9.0"], "arch='9.0' is not an architecture; write it as sm_80 or sm_90a"),
    (["--model", "missing.onnx"], "missing.onnx: there is no such file"),
    (["--dtype", "int8"], "'int8' is not one of"),
])
def test_bad_arguments_are_sentences(arguments, message):
    done = run(*arguments)
    assert done.exit_code != 0
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_size_left_open_is_said(tmp_path):
    graph = onnx.parser.parse_graph("g (float[N,3,H,8] x) => (float[N,3,H,8] y) {y = Relu (x)}")
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]),
              tmp_path / "open.onnx")
    done = run("--model", tmp_path / "open.onnx")
    assert "which kernels run depends on it" in done.output


def test_a_batch_of_a_gpus_size_is_compiled_ahead(tmp_path):
    """Its three values are 25 GB, which the host need not have."""
    graph = onnx.parser.parse_graph("g (float[N,8,16,16] x, float[N,8,16,16] z) => "
                                    "(float[N,8,16,16] y) {y = Add (x, z)}")
    path = tmp_path / "sum.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), path)
    options = CudaOptions(dtype="float32", arch="sm_90a", multiprocessors=132)
    names = {kernel.name for kernel in kernels_of(str(path), options, [1_000_000])}
    assert any(name.startswith("add") for name in names), names


def test_the_module_is_a_command():
    done = subprocess.run([sys.executable, "-m", "kernels.cuda.build", "--help"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert "Compile CUDA kernels ahead of time" in done.stdout


@pytest.mark.parametrize("dtype", backend.DTYPES)
def test_kernels_that_are_compiled_ahead_have_names_of_their_own(dtype):
    names = [kernel.name for kernel in backend.all_kernels(dtype)]
    assert len(names) == len(set(names))
    assert len(names) > 50


@pytest.mark.parametrize("dtype", backend.DTYPES)
def test_what_makes_probabilities_is_compiled_ahead_in_float32(dtype, small_model):
    wanted = {"softmax_warp_f32x4", "softmax_block_f32x4", "sigmoid_f32x4"}
    of_model = kernels_of(str(small_model), CudaOptions(dtype=dtype, arch="sm_90a",
                                                        multiprocessors=132), [1])
    for found in backend.all_kernels(dtype), of_model:
        assert wanted <= {kernel.name for kernel in found}
