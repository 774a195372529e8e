"""Measured choices of tiles, kept for each model of GPU: a JSON file in the cache.

A choice belongs to a problem, the sizes of a convolution or a linear layer as text. A file belongs
to a GPU's name and number of multiprocessors, and to the sources of the kernels that were measured:
with others it is stale. Reading never fails: what can not be used is left out, and the estimates
of host/conv_choice.py decide.
"""
from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from ..cache import cache_root, replace
from .conv_gemm import Tile
from .gpu import Gpu
from .host import conv, gemv, splitk
from .host.conv_choice import MOST_SPLITS, TILES, fits, has_clusters
from .launch import MOST_OF_A_CLUSTER, Choice
from .sources import source_hash

logger = logging.getLogger("kernels")


def path_of(gpu: Gpu) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return cache_root() / "tuned" / f"{name}-{gpu.multiprocessors}.json"


@cache
def kernels_hash() -> str:
    """Of the sources of all kernels among which there is a choice."""
    modules = {kernel.make.__module__ for dtype in TILES
               for kernel in (*conv.kernels(dtype), *gemv.kernels(conv.stored_as(dtype)),
                              *splitk.kernels(dtype))}
    hashes = "".join(source_hash(module) for module in sorted(modules))
    return hashlib.sha256(hashes.encode()).hexdigest()[:12]


def load(gpu: Gpu) -> dict[str, Choice]:
    """The choices that were measured on such a GPU, by problem; {} where there are none.

    A file that is damaged is named in a WARNING and counts as none.
    """
    path = path_of(gpu)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        belongs_to = stored["gpu"], stored["multiprocessors"], stored["kernels"]
        choices = {problem: Choice(Tile(*one["tile"]) if one["tile"] else None, one["splits"],
                                   one.get("cluster", False))
                   for problem, one in stored["choices"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s can not be read (%s: %s) and is left out of account: estimates choose "
                       "the kernels. Delete it, or write it anew with `cnn tune`", path,
                       type(error).__name__, error)
        return {}
    if belongs_to != (gpu.name, gpu.multiprocessors, kernels_hash()):
        logger.info("%s is of another GPU or of other kernels than these and is left out of "
                    "account; `cnn tune` writes it anew", path)
        return {}
    return {problem: choice for problem, choice in choices.items()
            if _exists(problem, choice, gpu)}


def _exists(problem: str, choice: Choice, gpu: Gpu) -> bool:
    """Whether there are such kernels."""
    if choice.tile is None:
        return choice.splits == 1 and not choice.cluster
    tiles = TILES.get(problem.partition(" ")[0], ())
    most = MOST_OF_A_CLUSTER if choice.cluster else MOST_SPLITS
    return (choice.tile in tiles and fits(choice.tile, gpu.arch)
            and isinstance(choice.splits, int) and 1 <= choice.splits <= most
            and (not choice.cluster or has_clusters(gpu.arch)))


def save(gpu: Gpu, choices: Mapping[str, Choice]) -> Path:
    """Add choices to the file, whose path is returned. OSError where it can not be written."""
    path = path_of(gpu)
    text = json.dumps({"gpu": gpu.name, "multiprocessors": gpu.multiprocessors,
                       "kernels": kernels_hash(),
                       "choices": {problem: {"tile": choice.tile, "splits": choice.splits,
                                             "cluster": choice.cluster}
                                   for problem, choice in sorted({**load(gpu), **choices}.items())}
                       }, indent=1)
    replace(path, text.encode())
    return path
