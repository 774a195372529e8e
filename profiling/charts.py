"""Draws rooflines (Williams, Waterman and Patterson 2009), of models and of measurements."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """A layer; its area is its time."""
    kind: str
    flops_per_byte: float
    tflops: float
    ms: float


@dataclass(frozen=True)
class Roofline:
    """Layers under their roofs: TFLOP/s by name, and TB/s."""
    title: str
    roofs: Mapping[str, float]
    bandwidth: float
    points: Sequence[Point]
    unit: str = "TFLOP/s"


def new_figure(width: float, height: float) -> Any:
    """ValueError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed: run "
                         "`pip install 'numba-cnn[profiling]'`, or leave --plot out") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_rooflines(rooflines: Sequence[Roofline], heading: str, path: Path) -> None:
    """One panel each, with one colour for a kind of layer in all of them: .svg or .png."""
    figure = new_figure(2 + 5.5 * len(rooflines), 5)
    figure.suptitle(heading)
    kinds = list(dict.fromkeys(point.kind for each in rooflines for point in each.points))
    figure.subplots(1, len(rooflines))
    for axes, each in zip(figure.axes, rooflines, strict=True):
        draw(axes, each, kinds)
    figure.legend(*axes.get_legend_handles_labels(), title="area: time", loc="outside right center")
    figure.savefig(path)


def draw(axes: Any, roofline: Roofline, kinds: Sequence[str]) -> None:
    bandwidth, points = roofline.bandwidth, roofline.points
    left = min([0.2, *(point.flops_per_byte / 2 for point in points if point.flops_per_byte)])
    right = max([5000, *(2 * point.flops_per_byte for point in points)])
    for name, peak in roofline.roofs.items():
        axes.plot([left, peak / bandwidth, right], [left * bandwidth, peak, peak], "0.6", zorder=0)
        axes.annotate(f"{name}, {peak:.3g} TFLOP/s", (left, peak), va="bottom")
    total = sum(point.ms for point in points)
    for i, kind in enumerate(kinds):
        axes.scatter([], [], 40, f"C{i}", label=kind)       # the legend's, all of one size
        chosen = [point for point in points if point.kind == kind]
        axes.scatter([point.flops_per_byte for point in chosen],
                     [point.tflops for point in chosen],
                     [4000 * point.ms / total for point in chosen], f"C{i}", alpha=0.5)
    axes.set(title=roofline.title, xscale="log", yscale="log", xlabel="FLOP per byte",
             ylabel=roofline.unit)
