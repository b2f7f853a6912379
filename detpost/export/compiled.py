"""``torch.compile`` with a known number of graphs: one for a batch of one image, one for every other batch."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["CompiledModule", "compile"]

# Modes whose outputs lie in the memory of a CUDA graph, which the next call writes anew.
_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


def compile(
    module: nn.Module,
    *,
    mode: str | None = None,
    backend: str | Callable[..., Any] = "inductor",
    dynamic_size: bool = True,
) -> CompiledModule:
    """Compile a post-processor or a detector whole, for every batch size at once.

    No graph breaks (``fullgraph=True``), and two graphs at the most however often the batch size changes: PyTorch ties
    a batch of 1 to a graph of its own, which is also the faster one, and the first batch of 2 or more makes the one
    graph that serves all others. An empty batch runs uncompiled. Another dtype, device, number of queries or classes,
    gradient mode, or an optional argument that comes or goes, is another graph, as always.

    Args:
        module: a :class:`DetectionPostProcessor`, a :class:`DetectorModule`, or any module whose tensor arguments all
            have the batch in front.
        mode: of ``torch.compile``. With ``"reduce-overhead"`` or ``"max-autotune"`` on a GPU, where CUDA graphs own the
            outputs, copies of them are given, so that one call never overwrites the answer of another.
        backend: of ``torch.compile``.
        dynamic_size: whether height and width of images (B, 3, H, W), and of masks beside them, are free as well. A
            model with tables made for a single size, as RT-DETR's ``anchor_image_size`` are, stays tied to it.
            ``False`` where they never change: compiling is quicker, and each other size would be another graph.

    Returns:
        A module that is called as ``module`` is and gives what it gives. Compiling happens in its first calls.

    Raises:
        TypeError: not a module.

    Example:
        >>> from detpost import DetectionPostProcessor
        >>> post = compile(DetectionPostProcessor.from_preset("rtdetr", top_k=3), backend="eager")
        >>> [post(torch.zeros(batch, 5, 2), torch.zeros(batch, 5, 4)).labels.shape[0] for batch in (1, 2, 7)]
        [1, 2, 7]
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"compile takes a module; got {type(module).__name__}")
    return CompiledModule(module, mode, backend, dynamic_size)


class CompiledModule(nn.Module):
    """What :func:`compile` gives.

    Args:
        module: the module that is compiled; parameters and buffers are its own.
        mode: of ``torch.compile``.
        backend: of ``torch.compile``.
        dynamic_size: whether height and width of images are free.
    """

    def __init__(
        self, module: nn.Module, mode: str | None, backend: str | Callable[..., Any], dynamic_size: bool
    ) -> None:
        super().__init__()
        self.module: nn.Module = module
        self.mode = mode
        self.dynamic_size = dynamic_size
        self._run = torch.compile(_own_code(module), fullgraph=True, mode=mode, backend=backend)

    def forward(self, *tensors: Any, **named: Any) -> Any:
        """Call the compiled module; arguments and results are the module's own."""
        given = [value for value in (*tensors, *named.values()) if isinstance(value, Tensor)]
        if any(value.ndim and value.shape[0] == 0 for value in given):
            return self.module(*tensors, **named)  # there is nothing to gain, and 0 would be a third graph
        has_images = self.dynamic_size and any(value.ndim == 4 for value in given)
        marked = [_mark(value, has_images) for value in tensors]
        found = self._run(*marked, **{name: _mark(value, has_images) for name, value in named.items()})
        return tree_map_only(Tensor, torch.clone, found) if self._is_lent(given) else found

    def _is_lent(self, given: list[Tensor]) -> bool:
        return self.mode in _CUDA_GRAPH_MODES and any(value.is_cuda for value in given)


def _own_code(module: nn.Module) -> Callable[..., Any]:
    """Wrap a module in a function with a code object of its own.

    Dynamo counts graphs per code object: compiled one by one, the post-processors of several specs would share the
    limit of recompilations of the one ``forward`` that they have in common.
    """

    def run(*tensors: Any, **named: Any) -> Any:
        return module(*tensors, **named)

    return types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)


def _mark(value: Any, has_images: bool) -> Any:
    """Say which dimensions are free, on an alias: the marks are attributes and must not stay on the caller's tensor."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    alias = value.view_as(value)
    if value.shape[0] > 1:
        torch._dynamo.mark_dynamic(alias, 0)
    if has_images and value.ndim in (3, 4):
        # "maybe": a model that is tied to one size is compiled for it, instead of not at all.
        torch._dynamo.maybe_mark_dynamic(alias, [value.ndim - 2, value.ndim - 1])
    return alias
