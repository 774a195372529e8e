"""The engines that compute a whole network on a GPU: ours, what PyTorch has, and JAX.

PyTorch is set up as whoever wants speed sets it up: images and weights channels_last, each batch
norm folded into the convolution before it and each layer scale into the Linear, attention by
scaled_dot_product_attention, cuDNN free to try all its algorithms (cudnn.benchmark), sums in fp32
as ours are. "eager" calls one layer after the other. "compile" is torch.compile, which may treat
weights as constants (freezing), in the mode that is asked for. Both are there inside a CUDA graph,
too: a call copies its batch to where the graph reads it.

JAX is there where it is installed: the same layers, jitted. Its streams are its own, so that a call
ends when its logits are there.
"""
from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch_setup import load_torch, set_tf32

import cnn
from kernels.cuda import gpu

OURS, EAGER, COMPILE, JAX = "ours", "eager", "compile", "jax"
IN_GRAPH = " in a graph"
RIVALS = (EAGER, EAGER + IN_GRAPH, COMPILE, COMPILE + IN_GRAPH,
          *[JAX] * bool(find_spec("jax")))
STORED = {"tf32": "float32"}        # what a dtype's images are of, where it is not their name
# Of torch.compile: the first tries most, which takes minutes a network.
COMPILE_MODES = ("max-autotune-no-cudagraphs", "default")
WARM_UP = 3         # calls before a capture


@dataclass(frozen=True)
class Engine:
    """A network that is ready for batches of one size.

    call     begins to compute the i-th of the batches that it was made for, on the stream that is
             measured; its logits, which lie on the GPU
    to_host  makes a NumPy array of such logits
    bytes    of GPU memory that it takes: weights, values, workspaces of libraries; no batches
    """
    name: str
    call: Callable[[int], Any]
    to_host: Callable[[Any], np.ndarray]
    bytes: int


def ours(path: Path, dtype: str, index: int, batches: Sequence[Any]) -> Engine:
    """For CuPy's arrays, (N, H, W, C). `bytes` are those that CuPy's pool has given out."""
    cupy = gpu.cupy()
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    model = cnn.load(path, device=f"cuda:{index}", dtype=dtype, activation="none")
    logits = model.predict(batches[0])
    used = pool.used_bytes() - before       # the logits are still held
    del logits
    return Engine(OURS, lambda i: model.predict(batches[i]), cupy.asnumpy, used)


class Torch:
    """PyTorch on the GPU and the stream that are measured, from now on its current ones.

    compile_mode: one of COMPILE_MODES
    """

    def __init__(self, index: int, stream: Any, compile_mode: str = COMPILE_MODES[0]) -> None:
        self.compile_mode = compile_mode
        self.torch = torch = load_torch(index, "PyTorch, which we are compared with,")
        torch.cuda.set_stream(torch.cuda.ExternalStream(stream.ptr))
        import torch._inductor.config as inductor
        inductor.freezing = True

    def reference(self, path: Path, images: np.ndarray) -> np.ndarray:
        """The float64 logits of images (N, H, W, C), computed on the CPU."""
        from torch_network import TorchNetwork  # imports torch
        nchw = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float64)
        return TorchNetwork(path).double()(self.torch.from_numpy(nchw)).numpy()

    def rivals(self, path: Path, dtype: str, batches: Sequence[Any]) -> Rivals:
        return Rivals(self.torch, path, dtype, batches, self.compile_mode)

    def release(self) -> None:
        """Give memory that nobody holds any more back to the driver."""
        self.torch._dynamo.reset()      # it holds what it compiled, and limits how much that is
        gc.collect()                    # modules and what is compiled refer to themselves
        self.torch.cuda.empty_cache()


class Rivals:
    """What others have for one network, for batches of one size: CuPy's arrays, (N, H, W, C).

    One that is inside a graph is to be made right after the same one outside, for only then is
    what has been allocated since that one's beginning its own.
    """

    def __init__(self, torch: Any, path: Path, dtype: str, batches: Sequence[Any],
                 compile_mode: str) -> None:
        self.torch, self.path, self.compile_mode = torch, path, compile_mode
        self.for_jax = path, dtype, batches
        self.dtype = getattr(torch, STORED.get(dtype, dtype))
        set_tf32(torch, dtype == "tf32")
        self.inputs = [torch.as_tensor(batch, device="cuda").to(self.dtype).permute(0, 3, 1, 2)
                       for batch in batches]
        self.made: dict[str, tuple[Callable[[Any], Any], int]] = {}

    def engine(self, name: str) -> Engine:
        """The one of that name among RIVALS; whatever its library raises if it can not be made."""
        if name == JAX:
            return in_jax(*self.for_jax)
        kind = name.removesuffix(IN_GRAPH)
        call, used = (self.plain(kind) if kind == name else self.in_graph(kind))
        return Engine(name, call, lambda y: y.float().cpu().numpy(), used)

    def function(self, kind: str) -> tuple[Callable[[Any], Any], int]:
        """(function of a batch, bytes allocated before it was made)"""
        from torch_network import TorchNetwork  # imports torch
        if kind not in self.made:
            before = self.torch.cuda.memory_allocated()
            function = TorchNetwork(self.path, fold=True).to(
                "cuda", self.dtype, memory_format=self.torch.channels_last)
            if kind == COMPILE:
                function = self.torch.compile(function, mode=self.compile_mode,
                                              fullgraph=True, dynamic=False)
            function(self.inputs[0])        # compiles; cuDNN tries its algorithms
            self.made[kind] = function, before
        return self.made[kind]

    def plain(self, kind: str) -> tuple[Callable[[int], Any], int]:
        cuda = self.torch.cuda
        function, before = self.function(kind)
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        function(self.inputs[0])
        return lambda i: function(self.inputs[i]), cuda.max_memory_allocated() - before

    def in_graph(self, kind: str) -> tuple[Callable[[int], Any], int]:
        """Captured as PyTorch's documentation of CUDA graphs has it, after calls on a stream of
        their own. Its memory is that of the graph's pool and what lies outside it."""
        cuda = self.torch.cuda
        function, before = self.function(kind)
        x = self.torch.empty_like(self.inputs[0]).copy_(self.inputs[0])
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(WARM_UP):
                function(x)
        cuda.current_stream().wait_stream(side)
        cuda.synchronize()
        cuda.empty_cache()
        outside, reserved = cuda.memory_allocated() - before, cuda.memory_reserved()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=side):
            y = function(x)
        used = outside + cuda.memory_reserved() - reserved

        def call(i: int) -> Any:
            x.copy_(self.inputs[i])
            graph.replay()
            return y
        return call, used


def in_jax(path: Path, dtype: str, batches: Sequence[Any]) -> Engine:
    """JAX's, for CuPy's arrays (N, H, W, C).

    `bytes` are those of weights, temporary values and logits.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")     # the GPU is not its alone
    import jax
    from jax_network import jax_network  # imports jax and torch
    stored = STORED.get(dtype, dtype)
    weights, function = jax_network(path, stored)
    gpu.cupy().cuda.get_current_stream().synchronize()
    images = [jax.dlpack.from_dlpack(batch).astype(stored) for batch in batches]
    with jax.default_matmul_precision("tensorfloat32" if dtype == "tf32" else "highest"):
        compiled = jax.jit(function).lower(weights, images[0]).compile()
    memory = compiled.memory_analysis()
    used = (memory.argument_size_in_bytes - images[0].nbytes + memory.temp_size_in_bytes
            + memory.output_size_in_bytes)
    return Engine(JAX, lambda i: compiled(weights, images[i]).block_until_ready(),
                  lambda y: np.asarray(y, np.float32), used)
