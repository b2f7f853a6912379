"""The benchmark's results: as JSON, as a table of Markdown, as a picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import is_installed
from benchmarks.race import Row, times

__all__ = ["machine", "write_json", "write_plot", "write_table"]

_LIBRARIES = (
    *("torch", "torchvision", "numpy", "triton", "kornia", "transformers", "rfdetr", "ultralytics", "monai", "scipy"),
    "pycocotools",
)
# One colour for a contender, whatever the panel.
_COLOURS = {
    "detpost": "#1f4fd8",
    "detpost (numpy)": "#6d9bff",
    "detpost (aten)": "#9fb4d9",
    "detpost (CUDA graph)": "#00b4d8",
    "detpost (per_image)": "#12307f",
    "detpost (ctypes)": "#4a5fa5",
    "detpost (operator)": "#8894bb",
    "out of place": "#9fb4d9",
    "out of place, compiled": "#2a9d8f",
    "transformers": "#d1495b",
    "kornia": "#e08e2b",
    "RF-DETR": "#7b4ea3",
    "RT-DETR (in place)": "#8c564b",
    "in place": "#8c564b",
    "Ultralytics": "#c2509d",
    "torchvision": "#0f8f8a",
    "MONAI": "#3a9d4a",
    "scipy": "#b8a100",
    "pycocotools": "#5b6b00",
    "read of the logits": "#777777",
    "read of the logits (CUDA graph)": "#aaaaaa",
}
_OPACITY = {", after a network": 0.35, ", cold": 0.0}  # of a mark, by how the contender's name ends
_MARKERS = {"detpost": "D", "read of the logits": "|", "read of the logits (CUDA graph)": "|"}


def machine() -> str:
    """Name the processor, the most that its instructions allow, and the threads in use."""
    model = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    level = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    parts = [facts.get("model name", model), level, f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    return ", ".join(part for part in parts if part)


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the rows with the machine, the versions and the date."""
    forced = {name: os.environ[name] for name in ("DETPOST_KERNEL", "DETPOST_NATIVE") if name in os.environ}
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "forced": forced,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _LIBRARIES if is_installed(name)},
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def write_table(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as Markdown, a line for each task and size: detpost's time, then every other's and its ratio."""
    lines = ["| task | size | detpost | others: time, times detpost's |", "| --- | --- | --- | --- |"]
    for task, size in dict.fromkeys((row.task, row.size) for row in rows):
        of_size = [row for row in rows if (row.task, row.size) == (task, size)]
        own = next(row for row in of_size if row.name == "detpost")
        rest = "; ".join(f"{row.name} {_time(row)}, {row.ratio:.2f}x{_peak(row)}" for row in of_size if row is not own)
        lines.append(f"| {task} | {times(size)} | {_time(own)}{_peak(own)} | {rest} |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _time(row: Row) -> str:
    return f"{row.microseconds:,.0f} us" if row.microseconds < 10_000 else f"{row.microseconds / 1000:,.1f} ms"


def _peak(row: Row) -> str:
    return "" if row.peak_bytes is None else f" ({row.peak_bytes / 1e6:,.1f} MB)"


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw one panel per task: a line for each size, on it a mark for each contender, at its time."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise ImportError("the plot needs matplotlib: pip install 'detpost[viz]'") from None
    tasks = list(dict.fromkeys(row.task for row in rows))
    across = min(3, len(tasks))
    panels = [tasks[start : start + across] for start in range(0, len(tasks), across)]
    lines = [max(len({row.size for row in rows if row.task == task}) for task in panel) for panel in panels]
    figure = Figure(figsize=(6.4 * across, sum(0.38 * count + 0.9 for count in lines) + 0.9), layout="constrained")
    grid = figure.add_gridspec(len(panels), across, height_ratios=[0.38 * count + 0.5 for count in lines])
    for down, panel in enumerate(panels):
        for place, task in enumerate(panel):
            _draw_panel(figure.add_subplot(grid[down, place]), task, [row for row in rows if row.task == task])
    names = list(dict.fromkeys(_plain_name(row.name) for row in rows))
    handles = [
        Line2D([], [], linestyle="", marker=_MARKERS.get(name, "o"), color=_colour(name), markersize=9, label=name)
        for name in names
    ]
    for suffix, opacity in _OPACITY.items():
        if any(row.name.endswith(suffix) for row in rows):
            face = ("black", opacity) if opacity else "none"
            label = suffix.removeprefix(", ")
            handles += [
                Line2D([], [], linestyle="", marker="o", color="black", markerfacecolor=face, markersize=9, label=label)
            ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _draw_panel(axes: Any, task: str, rows: list[Row]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    sizes = list(dict.fromkeys(row.size for row in rows))
    for place, size in enumerate(sizes):
        of_size = [row for row in rows if row.size == size]
        found = [row.microseconds for row in of_size]
        axes.plot([min(found), max(found)], [place, place], color="#dddddd", linewidth=2, zorder=1)
        for row in of_size:
            name = _plain_name(row.name)
            opacity = _opacity(row.name)
            face = (_colour(name), opacity) if opacity else "none"
            axes.scatter(
                row.microseconds,
                place,
                s=110 if name in _MARKERS else 60,
                marker=_MARKERS.get(name, "o"),
                edgecolors=None if name.startswith("read") else _colour(name),
                c=_colour(name) if name.startswith("read") else None,
                facecolors=None if name.startswith("read") else face,
                linewidths=1.8,
                zorder=3 if name == "detpost" else 2,
            )
    axes.set_yticks(range(len(sizes)), [times(size) for size in sizes])
    axes.set_ylim(len(sizes) - 0.5, -0.5)
    axes.set_xscale("log")
    least, most = min(row.microseconds for row in rows), max(row.microseconds for row in rows)
    axes.set_xlim(least / 1.6, most * 1.6)
    narrow = most / least < 12  # less than two powers of ten would be labelled
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if narrow else (1,), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(_axis_time))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, axis="x", which="both", alpha=0.25)
    axes.set_title(task, fontsize=11, loc="left")


def _plain_name(name: str) -> str:
    for suffix in _OPACITY:
        name = name.removesuffix(suffix)
    return name


def _opacity(name: str) -> float:
    return next((opacity for suffix, opacity in _OPACITY.items() if name.endswith(suffix)), 1.0)


def _colour(name: str) -> str:
    return _COLOURS.get(name, "#000000")


def _axis_time(microseconds: float, _: Any) -> str:
    if microseconds < 1000:
        return f"{microseconds:g} us"
    return f"{microseconds / 1e3:g} ms" if microseconds < 1e6 else f"{microseconds / 1e6:g} s"
