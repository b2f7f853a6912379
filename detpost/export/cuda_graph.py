"""A module replayed from a CUDA graph: one launch for a whole post-processor or detector."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["CudaGraph"]

# Shape, dtype and device of each input; None for an optional input that did not come.
Signature = tuple["tuple[torch.Size, torch.dtype, torch.device] | None", ...]

_WARM_UPS = 3  # libraries pick their algorithms and take their workspaces in the first calls, which a capture forbids


class CudaGraph:
    """Run a module from CUDA graphs, captured once per signature (shape, dtype and device of each input).

    A call copies its tensors into the graph's own inputs and replays; the host does nothing else. All graphs share one
    memory pool. Runs without gradients. Parameters may be changed in place between calls, but not moved or replaced.

    Safe to call from several threads and streams: a lock lets one call at a time copy, replay and clone, and each waits
    on the device for the one before it. Calls therefore never overlap; for that, make one object per thread. With
    ``clone=False`` the outputs belong to the graph, and no other call may come before they are read: from one thread
    at a time only.

    Args:
        module: what to run; it must not wait for the device. Takes tensors, or ``None`` for optional ones, by position.
        example: inputs to capture at once, so that a module that cannot be captured says so here; ``None`` captures in
            the first call.
        clone: whether the outputs are the caller's own; ``False`` lends the graph's, which the next call overwrites.
        max_signatures: most graphs kept, at least 1; beyond it the one unused for longest goes.

    Raises:
        RuntimeError: no CUDA device, or a module that cannot be captured; the message names it and the reason.
        ValueError: inputs that are not all on one CUDA device, or a bound below 1.

    Example:
        >>> from detpost import DetectionPostProcessor
        >>> post = DetectionPostProcessor.from_preset("rtdetr")
        >>> graph = CudaGraph(post) if torch.cuda.is_available() else post
        >>> device = "cuda" if torch.cuda.is_available() else "cpu"
        >>> graph(torch.zeros(1, 300, 80, device=device), torch.zeros(1, 300, 4, device=device)).scores.shape
        torch.Size([1, 300])
    """

    def __init__(
        self,
        module: nn.Module,
        example: Sequence[Tensor | None] | None = None,
        *,
        clone: bool = True,
        max_signatures: int = 8,
    ) -> None:
        if max_signatures < 1:
            raise ValueError(f"max_signatures must be at least 1; got {max_signatures}")
        _require_cuda()
        self.module = module
        self.clone = clone
        self.max_signatures = max_signatures
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Signature, _Captured] = OrderedDict()
        self._order = _StreamOrder()
        if example is not None:
            self(*example)

    def __call__(self, *inputs: Tensor | None) -> Any:
        """Run the module.

        Args:
            inputs: what the module takes, on one CUDA device, or ``None`` for optional ones.

        Returns:
            What the module returns; clones, unless ``clone=False``.

        Raises:
            RuntimeError: a module that cannot be captured.
            TypeError: an input that is neither a tensor nor ``None``.
            ValueError: inputs that are not all on one CUDA device.
        """
        device = _device_of(inputs)
        signature = _signature_of(inputs)
        with self._lock, self._order.on(device):
            captured = self._graph_for(signature, inputs, device)
            captured.fill(inputs)
            captured.replay()
            return tree_map_only(Tensor, torch.clone, captured.outputs) if self.clone else captured.outputs

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """The signatures with a graph, the one unused for longest first."""
        with self._lock:
            return tuple(self._graphs)

    def _graph_for(self, signature: Signature, inputs: Sequence[Tensor | None], device: torch.device) -> _Captured:
        captured = self._graphs.pop(signature, None)
        if captured is None:
            if len(self._graphs) >= self.max_signatures:
                _wait_for(device)  # the graph that goes may still be running
                self._graphs.popitem(last=False)
            # All graphs take memory from the pool of the first one that is still there.
            pool = next((other.pool for other in self._graphs.values()), None)
            captured = _capture(self.module, inputs, device, pool)
        self._graphs |= {signature: captured}  # the end of the order: the one used last
        return captured


@dataclass(frozen=True)
class _Captured:
    """One captured graph, with the tensors that it reads and writes."""

    inputs: tuple[Tensor | None, ...]
    outputs: Any
    replay: Callable[[], None]
    pool: Any

    def fill(self, given: Sequence[Tensor | None]) -> None:
        """Copy the caller's tensors into the graph's inputs."""
        for own, value in zip(self.inputs, given, strict=True):
            if own is not None and value is not None:
                # A graph reads the addresses that it was captured with, so its inputs have to be written in place.
                own.copy_(value.detach(), non_blocking=True)  # detpost: allow DP003


class _StreamOrder:
    """Make calls from different streams wait for each other on the device: the lock orders the host alone."""

    def __init__(self) -> None:
        self._done: torch.cuda.Event | None = None

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            yield
            self._done = stream.record_event()


def _capture(module: nn.Module, given: Sequence[Tensor | None], device: torch.device, pool: Any) -> _Captured:
    """Warm up on a side stream, then capture there."""
    inputs = tuple(None if value is None else torch.empty_like(value.detach()) for value in given)
    graph = torch.cuda.CUDAGraph()
    captured = _Captured(inputs, None, graph.replay, pool)
    captured.fill(given)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.no_grad():
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    module(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            # thread_local: what other threads allocate meanwhile is none of this capture's business.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                outputs = module(*inputs)
    except Exception as error:
        raise RuntimeError(
            f"{type(module).__name__} cannot be captured in a CUDA graph: {_cause(error)}; a captured module must not "
            "wait for the device, and detpost.purity.check names the line that does"
        ) from error
    return _Captured(inputs, outputs, graph.replay, graph.pool())


def _cause(error: BaseException) -> str:
    """Give the first line of what went wrong first: leaving a broken capture raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _require_cuda() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("CudaGraph needs a CUDA device and there is none: detpost.export.compile serves a CPU")


def _device_of(inputs: Sequence[Tensor | None]) -> torch.device:
    for value in inputs:
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"CudaGraph takes tensors or None; got {type(value).__name__}")
    devices = {value.device for value in inputs if value is not None}
    device = next(iter(devices), None)
    if device is None or len(devices) > 1 or device.type != "cuda":
        came = ", ".join(sorted(map(str, devices))) or "no tensor"
        raise ValueError(f"CudaGraph needs inputs on one CUDA device; got {came}: move them with .to()")
    return device


def _signature_of(inputs: Sequence[Tensor | None]) -> Signature:
    return tuple(None if value is None else (value.shape, value.dtype, value.device) for value in inputs)


def _wait_for(device: torch.device) -> None:
    torch.cuda.synchronize(device)
