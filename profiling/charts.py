"""Draws rooflines (Williams, Waterman and Patterson 2009), of models and of measurements, and bars
that compare times."""
from __future__ import annotations

import math
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


@dataclass(frozen=True)
class Bars:
    """Groups of bars: of each series its value in each group, NaN where there is none."""
    title: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[float]]


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


def save_bars(panels: Sequence[Bars], heading: str, unit: str, path: Path) -> None:
    """One panel below the other, a line at 1: .svg or .png."""
    widest = max(len(each.groups) * len(each.series) for each in panels)
    figure = new_figure(3 + 0.4 * widest, 0.5 + 2.8 * len(panels))
    figure.suptitle(heading)
    figure.subplots(len(panels))
    for axes, each in zip(figure.axes, panels, strict=True):
        width = 0.8 / len(each.series)
        for i, (name, values) in enumerate(each.series.items()):
            places = [group + (i - (len(each.series) - 1) / 2) * width
                      for group in range(len(each.groups))]
            bars = axes.bar(places, values, width, color=f"C{i}", label=name)
            axes.bar_label(bars, ["" if math.isnan(value) else f"{value:.2f}" for value in values],
                           padding=2, fontsize=7)
        axes.axhline(1, color="0.6", zorder=0)
        axes.set_xticks(range(len(each.groups)), each.groups)
        axes.margins(y=0.12)
        axes.set(title=each.title, ylabel=unit)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path)
