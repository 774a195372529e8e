"""The wheel and the sdist: what is in them, and that they work installed, from another folder."""
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSIDE = ["cnn/__init__.py", "cnn/py.typed", "cnn/passes/layout.py", "cnn/zoo/README.md",
          "cnn/zoo/efficientnet_lite0.onnx", "cnn/zoo/imagenet_labels.txt", "kernels/__init__.py",
          "kernels/py.typed", "kernels/cpu/microkernels.py", "kernels/reference.py"]
LICENCES = ["LICENSE", "cnn/zoo/LICENSE-efficientnet_lite0.txt",
            "cnn/zoo/LICENSE-imagenet_labels.txt"]
OUTSIDE = ("tests/", "profiling/", "examples/")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist); the wheel is built from the sdist, so that this must be complete."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True,
                   capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_the_packages_models_and_licences_and_nothing_else(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert not [name for name in INSIDE if name not in names]
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert not [name for name in LICENCES if f"{info}/licenses/{name}" not in names]
    assert {name.split("/")[0] for name in names} == {"cnn", "kernels", info}
    assert built[0].stat().st_size < 12_000_000


def test_the_sdist_is_complete_and_without_tests(built):
    with tarfile.open(built[1]) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    assert not [name for name in (*INSIDE, *LICENCES, "pyproject.toml", "README.md")
                if name not in names]
    assert not [name for name in names if name.startswith(OUTSIDE)]


def test_it_works_installed_in_a_clean_environment(built, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(built[0]))
    photo = str(ROOT / "examples" / "cat.jpg")
    out = run(str(tmp_path / "venv" / "bin" / "cnn"), "classify", photo, "--csv", "--top", "1")
    assert out.splitlines()[1].split(",")[1:4] == ["1", "282", "tiger cat"]
    code = "import cnn, kernels; print(cnn.__file__); print(kernels.__file__)"
    assert all(str(tmp_path) in line for line in run(python, "-c", code).splitlines())
    assert str(tmp_path) in run(python, "-m", "cnn", "doctor")
