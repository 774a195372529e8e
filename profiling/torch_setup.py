"""PyTorch as whoever wants speed of it sets it up, for all that is compared with it."""
from __future__ import annotations

from typing import Any


def load_torch(index: int, what: str = "PyTorch", advice: str = "") -> Any:
    """The module, on this GPU. Where it is missing or sees none, a ValueError that begins with
    `what` and ends in `advice`.

    cuDNN may try all its algorithms (cudnn.benchmark), sums are fp32 as ours are, and no gradients
    are kept.
    """
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{what} can not be imported ({error}): install torch{advice}") from error
    if not torch.cuda.is_available():
        raise ValueError(f"PyTorch {torch.__version__} sees no GPU: install a build for CUDA"
                         f"{advice}")
    torch.cuda.set_device(index)
    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch


def set_tf32(torch: Any, allow: bool) -> None:
    """By the old names and the new ones: torch.compile reads both, and PyTorch refuses to be asked
    where they disagree."""
    for backend in torch.backends.cuda.matmul, torch.backends.cudnn:
        backend.allow_tf32 = allow
        backend.fp32_precision = "tf32" if allow else "ieee"
