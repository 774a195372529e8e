"""The CPU's kernels; docs/cpu.md says what is where."""
import sys

if sys.platform == "win32":
    raise ImportError("numba-cnn runs on Linux, and is written for macOS; on Windows install it "
                      "within WSL 2 (https://learn.microsoft.com/windows/wsl)")
