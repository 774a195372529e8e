"""The engines that compute a whole network on the CPU, each in a process of its own.

All have the same number of threads, and each has its own native layout. In float32 each computes
in just that; in bfloat16 each does what it does best on a CPU that has it: OpenVINO what it does if
nobody asks for float32, ONNX Runtime, which has no such thing, float32. In int8 the file is
quantised, and each does what it does with it, and all else as in bfloat16. Workers are commanded in
turn and sit idle between turns, because thread pools spin for a while after a call and tax whoever
runs next.
"""
from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT

sys.path.insert(0, str(ROOT))       # this checkout, installed or not

OURS = "ours"

Call = Callable[[], np.ndarray]
# (model file, batch (N, C, H, W), threads), and maybe a dtype -> a call that gives the logits.
# Each imports its library inside, so that a worker holds no engine but its own.
Engine = Callable[..., Call]
Rounds = list[list[float]]          # seconds of each call, round by round


# ---- engines ----------------------------------------------------------------------------------

def ours(path: str, batch: np.ndarray, threads: int, dtype: str = "float32") -> Call:
    import cnn
    if dtype == "int8":
        dtype = beside_int8()
    model = cnn.load(path, device="cpu", threads=threads, dtype=dtype, activation="none")
    nhwc = np.ascontiguousarray(batch.transpose(0, 2, 3, 1))
    return lambda: model.predict(nhwc)


def beside_int8() -> str:
    """What we and OpenVINO compute in besides 8 bits, which the file says."""
    from kernels.cpu.host.unit_choice import choose
    try:
        choose()
    except ValueError:      # the CPU has none
        return "float32"
    return "bfloat16"


def onnx_runtime(path: str, batch: np.ndarray, threads: int, dtype: str = "float32") -> Call:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: batch}
    return lambda: session.run(None, feed)[0]


def openvino(path: str, batch: np.ndarray, threads: int, dtype: str = "float32") -> Call:
    """Float32 it must be told where the CPU has bfloat16, or where it is held to an older CPU
    (ONEDNN_MAX_CPU_ISA) and believes that there is."""
    import openvino
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(batch.shape))
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    if dtype == "int8":
        dtype = beside_int8()
    if dtype == "float32":
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda: request.infer([batch], share_inputs=True)[0]


def pytorch(path: str, batch: np.ndarray, threads: int, dtype: str = "float32") -> Call:
    """In channels_last, where its convolutions are fastest, batch norm and layer scale folded."""
    import torch
    from torch_network import TorchNetwork
    torch.set_num_threads(threads)
    kind = {"dtype": getattr(torch, dtype), "memory_format": torch.channels_last}
    network = TorchNetwork(path, fold=True).to(**kind)
    images = torch.from_numpy(batch).to(**kind)

    @torch.inference_mode()
    def call() -> np.ndarray:
        return network(images).float().numpy()
    return call


# Whom we are compared with, by the module that each needs.
PEERS: dict[str, Engine] = {"onnxruntime": onnx_runtime, "openvino": openvino, "torch": pytorch}


def is_installed(peer: str) -> bool:
    return importlib.util.find_spec(peer) is not None


# ---- worker processes -------------------------------------------------------------------------

class Worker:
    """One engine in a process of its own.

    RuntimeError where the process ends by itself; its own traceback is on stderr by then.
    """

    def __init__(self, name: str, engine: Engine, path: Path, batch: np.ndarray,
                 threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, daemon=True,
                                       args=(theirs, engine, str(path), batch, threads))
        self.process.start()
        theirs.close()

    def logits(self) -> np.ndarray:
        """What the engine gives for the batch, once it is ready; to be asked for once."""
        return self._answer()

    def turn(self, calls: int) -> list[float]:
        """Seconds of each of `calls` calls that follow one warm-up call."""
        self.pipe.send(calls)
        return self._answer()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(0)
        self.process.join()

    def _answer(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"the worker of {self.name} ended with exit code "
                               f"{self.process.exitcode}; its error stands above") from None


@contextlib.contextmanager
def started(engines: dict[str, Engine], path: Path, batch: np.ndarray,
            threads: int) -> Iterator[list[Worker]]:
    """A worker for each engine, ended with the block. They get ready at the same time."""
    workers: list[Worker] = []
    try:
        for name, engine in engines.items():
            workers.append(Worker(name, engine, path, batch, threads))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def serve(pipe: Connection, engine: Engine, path: str, batch: np.ndarray, threads: int) -> None:
    """A worker's whole life: send the logits, then answer each number of calls; 0 ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is the commander's: it will send a 0
    call = engine(path, batch, threads)
    pipe.send(call())
    while calls := pipe.recv():
        call()
        pipe.send([seconds(call) for _ in range(calls)])


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(workers: Sequence[Worker], rounds: int, calls: int, idle: float,
               after_round: Callable[[], object]) -> list[Rounds]:
    """The rounds of each worker. Each goes first in turn; all idle (seconds) before every turn.

    ONNX Runtime's threads were seen to spin for 33 ms after a call: idle should be longer.
    """
    times: list[Rounds] = [[] for _ in workers]
    order = list(zip(workers, times, strict=True))
    for _ in range(rounds):
        for worker, mine in order:
            time.sleep(idle)
            mine.append(worker.turn(calls))
        order = order[1:] + order[:1]
        after_round()
    return times
