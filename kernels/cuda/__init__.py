"""Hand-written Numba CUDA kernels; `host/` chooses among them, `backend.py` is the way in."""
