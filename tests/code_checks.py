"""What the tests of values in codes of 8 bits share: kernels that read or write them, and networks
of such."""
from __future__ import annotations

import numpy as np
from checks import GUARD, THREADS, aligned
from int8_checks import quantise, specs, values, weights

from cnn.graph import Graph, Node
from cnn.storage import storage
from kernels.cpu import backend
from kernels.cpu.threads import team
from kernels.ops import Conv2d, Grid, Op, TensorSpec
from kernels.step import Options

# A grid of what a ReLU gives, and two of any numbers, with an even zero point and an odd one.
ABOVE, EVEN, ODD = Grid(0.5, 0), Grid(4.0, 100), Grid(4.0, 101)
SMALL = (2, 6, 5, 8)        # an input of networks


def run_codes(op: Op, arrays, grids, output: TensorSpec | None = None, kernel: str = "",
              gap: int = 0, weights=(), dtype: str = "float32") -> np.ndarray:
    """The output of the kernel that the backend takes, which is float32 unless its spec is given;
    weights: positions of constants. It is the same with 1 and 2 threads whatever was there before,
    so all of it was written, and nothing beside it; inputs are as before.

    gap: numbers between a pixel of the output and the next one.
    """
    inputs, output = specs(op, arrays, grids, output)
    constants = [array if i in weights else None for i, array in enumerate(arrays)]
    before, results = [array.tobytes() for array in arrays], []
    *places, channels = output.shape
    wide, first = (*places, channels + gap), gap // 2
    size = int(np.prod(wide)) * np.dtype(output.dtype).itemsize
    for threads, fill in zip((1, THREADS[-1]), (0xFF, 0x5A), strict=True):
        step = backend.prepare(op, inputs, output, constants, Options(threads, dtype))
        assert step.kernel.startswith(kernel), step.kernel
        assert step.strided or not gap
        block = aligned(size + 2 * GUARD, fill)
        whole = block[GUARD:GUARD + size].view(output.dtype).reshape(wide)
        y = whole[..., first:first + channels]
        with team(threads):
            for launch in step.bind(arrays, y, aligned(step.workspace)):
                launch()
        results.append(y.copy())
        whole.view(np.uint8).reshape(*wide, -1)[..., first:first + channels, :] = fill
        assert (block == fill).all(), "written beside the output"
    assert results[0].tobytes() == results[1].tobytes()
    assert [array.tobytes() for array in arrays] == before, "an input was changed"
    return results[0]


def of_norm(channels, *shape):
    """(x on ODD, scale, bias, mean, var): factors are powers of two, and shifts whole numbers."""
    rng = np.random.default_rng(channels)
    return [values(rng, ODD, *shape, channels), rng.choice(np.float32([-0.5, 0.25, 1]), channels),
            rng.integers(-9, 10, channels).astype(np.float32),
            rng.integers(-9, 10, channels).astype(np.float32),
            rng.choice(np.float32([0, 0.75]), channels)]


class Net:
    """Layers added one by one, with weights that are codes times a power of two. `q` is the input
    on ABOVE, and each layer gives numbers of a grid unless it is told None."""

    def __init__(self):
        self.rng, self.nodes, self.constants = np.random.default_rng(0), [], {}
        self.steps = {"x": 1.0}     # of the grid of each value
        self.add(quantise(ABOVE), ("x",), "q")

    def add(self, op, inputs, name):
        last = getattr(op, "activation", op)
        self.steps[name] = getattr(last, "scale", self.steps[inputs[0]])
        self.nodes.append(Node(op, tuple(inputs), name, name))
        return name

    def constant(self, array):
        name = f"w{len(self.constants)}"
        self.constants[name] = array.astype(np.float32)
        return name

    def conv(self, x, name, grid=ODD, k=1, inputs=8, outputs=8, groups=1, activation=None,
             residual=(), factors=(1.0, 0.5, 0.25)):
        """Its sums are of the size of its grid; factors: of each third of the outputs."""
        step = self.steps[x] if grid is None else grid.scale
        size = (k * k * inputs // groups) ** 0.5
        scale = np.exp2(np.rint(np.log2(0.03 * step / self.steps[x] / size)))
        weight = weights(self.rng, outputs, k, k, inputs // groups, scale=np.float32(scale))
        weight *= np.resize(np.float32(factors), outputs).reshape(-1, 1, 1, 1)
        bias = self.rng.integers(-99, 100, outputs) * (step / 8)
        last = activation if grid is None else quantise(grid)
        op = Conv2d(padding=(k // 2,) * 4, groups=groups, activation=last)
        return self.add(op, (x, self.constant(weight), self.constant(bias), *residual), name)

    def graph(self, *outputs):
        return Graph({"x": TensorSpec(SMALL)}, outputs, tuple(self.nodes), self.constants)


def chain():
    """q -> a -> b -> c, with a as residual of c."""
    net = Net()
    net.conv("q", "a", ABOVE)
    net.conv("a", "b")
    net.conv("b", "c", residual=("a",))
    return net


def in_codes(graph, device, keep=frozenset()):
    specs = storage(graph, device, device.options(), keep)
    assert all(spec.dtype == "float32" or spec.grid is not None for spec in specs.values())
    return {name for name, spec in specs.items() if spec.dtype == "uint8"}
