"""What PyTorch has for a layer: cuDNN's convolutions, cuBLAS' products, its own pooling kernels.

Images are channels_last, and PyTorch is set up by torch_setup.py. Where the layer ends in a bias, a
residual or an activation, plain PyTorch runs these as kernels of their own; cuDNN's fused operators
are another rival, where there is one. "alone" is the convolution without all that: less work than
the layer, and not a rival.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from gpu_timing import Rival
from layer_cases import Arrays, Case
from torch_setup import load_torch, set_tf32

from kernels import ops
from kernels.cuda import gpu

ALONE = "conv2d alone"
Function = Callable[..., Any]       # of the tensors x, weight, bias, residual, as far as there are


class Torch:
    """PyTorch on the GPU and the stream that are measured."""

    def __init__(self, index: int, stream: Any, dtype: str) -> None:
        self.torch = load_torch(index, advice=", or give --no-torch to time our kernels alone")
        set_tf32(self.torch, dtype == "tf32")
        self.stream = self.torch.cuda.ExternalStream(stream.ptr)

    def rivals(self, arrays: Arrays) -> Iterator[tuple[Rival, Any]]:
        """Each rival of a case with its output for the first copy, NHWC, as CuPy has it."""
        torch, case = self.torch, arrays.case
        with torch.cuda.stream(self.stream):
            given = self.tensors(arrays)
        for name, function in functions(torch, case).items():
            with torch.cuda.stream(self.stream):
                y = self.as_cupy(function(*given[0]))   # cuDNN tries its algorithms here
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                outputs = [function(*tensors) for tensors in given]
            yield Rival(name, self.replay(graph, outputs), len(given)), y

    def replay(self, graph: Any, outputs: list[Any]) -> Callable[[], None]:
        """Holding on to the outputs keeps each call's memory its own."""
        def run() -> None:
            assert outputs
            with self.torch.cuda.stream(self.stream):
                graph.replay()
        return run

    def tensors(self, arrays: Arrays) -> list[list[Any]]:
        """The arguments of each call: inputs share their memory with CuPy's arrays."""
        constants = [None if array is None else self.torch.from_numpy(array).to(
            "cuda", self.stored(arrays.case)) for array in arrays.constants]
        return [[nchw(constant.clone() if array is None else self.from_cupy(array, arrays.case))
                 for array, constant in zip(copy, constants, strict=True)]
                for copy in arrays.copies]

    def stored(self, case: Case) -> Any:
        return getattr(self.torch, case.stored)

    def from_cupy(self, array: Any, case: Case) -> Any:
        """The same memory. torch knows no more of bfloat16 than its bits."""
        words = array.view(np.int16) if case.stored == "bfloat16" else array
        return self.torch.as_tensor(words, device="cuda").view(self.stored(case))

    def as_cupy(self, y: Any) -> Any:
        y = y.permute(0, 2, 3, 1) if y.dim() == 4 else y
        bits = y.contiguous().view(self.torch.int16) if y.dtype == self.torch.bfloat16 else y
        return gpu.cupy().asarray(bits)


def nchw(tensor: Any) -> Any:
    """An image or a convolution's weights as torch wants them: channels_last in memory."""
    return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor


def functions(torch: Any, case: Case) -> dict[str, Function]:
    """By name, what computes the case of NCHW tensors in channels_last, or of matrices.

    ValueError for a padding that torch does not take.
    """
    op, activate = case.op, activation(torch, getattr(case.op, "activation", None))
    functional = torch.nn.functional
    if isinstance(op, ops.Conv2d):
        return convolutions(torch, op, len(case.shapes), activate)
    if isinstance(op, ops.Linear):
        if len(case.shapes) == 2 and op.activation is None:
            return {"matmul": lambda x, weight: torch.matmul(x, weight.t())}
        return {"linear": linear(torch, activate)}
    if isinstance(op, ops.Attention):
        return {"scaled_dot_product_attention": attention(torch, op)}
    if isinstance(op, ops.MaxPool2d):
        return {"max_pool2d": lambda x: functional.max_pool2d(
            x, op.kernel_size, op.stride, symmetric(op), op.dilation, op.ceil_mode)}
    if isinstance(op, ops.AvgPool2d):
        return {"avg_pool2d": lambda x: functional.avg_pool2d(
            x, op.kernel_size, op.stride, symmetric(op), op.ceil_mode, op.count_include_pad)}
    if isinstance(op, ops.GlobalAvgPool2d):
        return {"adaptive_avg_pool2d": lambda x: functional.adaptive_avg_pool2d(x, 1)}
    if isinstance(op, ops.Relu):
        return {"relu": torch.relu}
    raise ValueError(f"no rival is known for {op.kind}")


def linear(torch: Any, activate: Function) -> Function:
    def run(x: Any, weight: Any, bias: Any = None, residual: Any = None) -> Any:
        y = torch.nn.functional.linear(x, weight, bias)
        return activate(y if residual is None else y.add_(residual))
    return run


def attention(torch: Any, op: ops.Attention) -> Function:
    """By whichever of its kernels PyTorch takes."""
    def heads_first(x: Any) -> Any:
        return x.permute(0, 2, 3, 1).transpose(1, 2)        # of what `nchw` took for an image

    def run(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        y = torch.nn.functional.scaled_dot_product_attention(
            *map(heads_first, (q, k, v)), attn_mask=None if bias is None else bias[None],
            scale=op.scale)
        return nchw(y.transpose(1, 2))
    return run


def convolutions(torch: Any, op: ops.Conv2d, arity: int, activate: Function) -> dict[str, Function]:
    where = (op.stride, symmetric(op), op.dilation, op.groups)

    def plain(x: Any, weight: Any, bias: Any = None, residual: Any = None) -> Any:
        y = torch.nn.functional.conv2d(x, weight, bias, *where)
        return activate(y if residual is None else y.add_(residual))

    def alone(x: Any, weight: Any, *rest: Any) -> Any:
        return torch.nn.functional.conv2d(x, weight, None, *where)

    def fused(x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *where)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *where)
    found = {"conv2d": plain}
    if isinstance(op.activation, ops.Relu) and arity > 2:
        found["cudnn_convolution_relu"] = fused
    if arity > 2 or op.activation is not None:
        found[ALONE] = alone
    return found


def symmetric(op: ops.Conv2d | ops.Pool2d) -> tuple[int, int]:
    top, left, bottom, right = op.padding
    if (top, left) != (bottom, right):
        raise ValueError(f"torch takes one padding for both ends of an axis, not {op.padding}")
    return top, left


def activation(torch: Any, op: ops.Unary | None) -> Function:
    """In place, as PyTorch does it best."""
    functional = torch.nn.functional
    match op:
        case None:
            return lambda x: x
        case ops.Relu():
            return torch.relu_
        case ops.Clip(low, high):
            return lambda x: functional.hardtanh_(x, low, high)
        case ops.Silu():
            return lambda x: functional.silu(x, inplace=True)
        case ops.HardSwish():
            return lambda x: functional.hardswish(x, inplace=True)
        case ops.Sigmoid():
            return torch.sigmoid_
        case ops.Tanh():
            return torch.tanh_
        case ops.HardSigmoid(alpha, beta):      # torch's own has one alpha and beta
            if op == ops.HardSigmoid():
                return lambda x: functional.hardsigmoid(x, inplace=True)
            return lambda x: x.mul_(alpha).add_(beta).clamp_(0, 1)
        case ops.LeakyRelu(alpha):
            return lambda x: functional.leaky_relu_(x, alpha)
        case ops.Elu(alpha):
            return lambda x: functional.elu_(x, alpha)
        case ops.Gelu(tanh):                    # torch has none in place
            return lambda x: functional.gelu(x, approximate="tanh" if tanh else "none")
        case ops.Erf():
            return torch.erf_
        case ops.Sqrt():
            return torch.sqrt_
        case ops.StarRelu(scale, bias):
            return lambda x: functional.relu_(x).square_().mul_(scale).add_(bias)
        case ops.FakeQuantize(scale, zero_point, relu):     # torch has none in place
            least = zero_point if relu else 0
            return lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, least, 255)
        case _:
            raise ValueError(f"no rival is known for {op.kind}")
