"""How time and peak memory of the losses grow with the image: `python -m benchmarks.growth`.

Each contender has a process of its own. For each size: one call on a small one, so that code and tables are there, then
calls on the asked one, forward and backward. A contender that exceeds the patience is asked nothing larger.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import is_installed

_PLANES: list[tuple[int, ...]] = [(side, side) for side in (64, 128, 256, 512, 1024, 2048)]
_VOLUMES: list[tuple[int, ...]] = [(side, side, side) for side in (32, 64, 128, 256, 384)]
_LOSSES = ("HausdorffDTLoss", "HausdorffERLoss", "BoundaryLoss", "GeneralizedSurfaceLoss")
_PEER = {"HausdorffDTLoss": ("monai", "scipy"), "HausdorffERLoss": ("kornia",)}


def _scene(sides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Give probabilities (1, 2, ...) and class ids (1, 1, ...): a ball that the prediction has moved and roughened."""
    axes = [torch.linspace(-1, 1, side) for side in sides]
    grid = torch.meshgrid(*axes, indexing="ij")
    radius = torch.stack([axis.square() for axis in grid]).sum(0).sqrt()
    moved = torch.stack([(axis - 0.1).square() for axis in grid]).sum(0).sqrt()
    noise = torch.rand(sides, generator=torch.Generator().manual_seed(0))
    foreground = torch.sigmoid(20 * (0.6 - moved) + 2 * noise - 1)
    return torch.stack([1 - foreground, foreground])[None], (radius < 0.6).long()[None, None]


def _loss(loss: str, contender: str, axes: int) -> Callable[[Tensor, Tensor], Tensor]:
    module: Any = __import__(f"{contender}.losses", fromlist=["losses"])
    name = f"{loss}3D" if loss == "HausdorffERLoss" and axes == 3 else loss
    options = {} if loss == "HausdorffERLoss" else {"to_onehot_y": True}
    made: Callable[[Tensor, Tensor], Tensor] = getattr(module, name)(**options)
    return made


def _measure(loss: str, contender: str, sides: tuple[int, ...]) -> tuple[float, int]:
    """Give the least of up to three times in seconds, and the growth of the process in bytes."""
    function = _loss(loss, contender, len(sides))

    def run(probability: Tensor, target: Tensor) -> float:
        leaf = probability.detach().requires_grad_()
        begin = time.perf_counter()
        torch.autograd.backward(function(leaf, target))
        return time.perf_counter() - begin

    run(*_scene((32,) * len(sides)))
    inputs = _scene(sides)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what comes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    seconds = [run(*inputs)]
    peak = _status("VmHWM") - before
    while len(seconds) < 3 and sum(seconds) < 20:
        seconds.append(run(*inputs))
    return min(seconds), peak


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _measured(
    loss: str, contender: str, sizes: list[tuple[int, ...]], patience: int
) -> Iterator[tuple[float, int] | str]:
    """Measure size by size in a child; at last a word for what kept it from answering."""
    asked = json.dumps([loss, contender, sizes, patience])
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.growth", "--child", asked]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in (os.getcwd(), *sys.path) if path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        for line in child.stdout:
            seconds, peak = json.loads(line)
            yield seconds, peak
    if child.returncode:
        words = {-signal.SIGALRM: "patience", -signal.SIGKILL: "memory"}
        yield words.get(child.returncode, "memory or order")


def _child(asked: str) -> None:
    """Measure each size; the alarm ends the process in the middle of one that takes too long."""
    loss, contender, sizes, patience = json.loads(asked)
    _loss(loss, contender, 2)  # imports are no part of anyone's patience
    for sides in sizes:
        signal.alarm(patience)
        print(json.dumps(_measure(loss, contender, tuple(sides))), flush=True)
        signal.alarm(0)


def _row(loss: str, contender: str, sides: tuple[int, ...], found: tuple[float, int] | str) -> str:
    size = "x".join(map(str, sides))
    if isinstance(found, str):
        return f"| {loss} | {size} | {contender} | out of {found} | | | |"
    seconds, peak = found
    elements = 2 * math.prod(sides)
    each = f"{seconds / elements * 1e9:,.1f} | {peak / elements:,.1f}"
    return f"| {loss} | {size} | {contender} | {seconds * 1e3:,.1f} | {peak / 1e6:,.1f} | {each} |"


def main(arguments: list[str] | None = None) -> None:
    """Print the table line by line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--patience", type=int, default=300, help="seconds for one number")
    parser.add_argument("--largest", type=int, default=2048 * 2048 * 14, help="elements of a channel, at most")
    parser.add_argument("--loss", choices=_LOSSES, action="append", help="one loss or several; all by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        _child(options.child)
        return
    print("| loss, forward and backward | 1x2x | contender | ms | peak MB | ns an element | bytes an element |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for loss in options.loss or _LOSSES:
        peer = _PEER.get(loss)
        contenders = ["detpost", *([peer[0]] if peer and is_installed(*peer) else [])]
        for every in (_PLANES, _VOLUMES):
            sizes = [sides for sides in every if math.prod(sides) <= options.largest]
            for contender in contenders:
                for sides, found in zip(sizes, _measured(loss, contender, sizes, options.patience), strict=False):
                    print(_row(loss, contender, sides, found), flush=True)


if __name__ == "__main__":
    main()
