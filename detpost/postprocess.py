"""From raw logits and boxes to detections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from detpost import kernels
from detpost.detections import Detections
from detpost.spec import DecodeSpec

__all__ = ["DetectionPostProcessor", "DetectorModule", "raw_outputs"]


class DetectionPostProcessor(nn.Module):
    """Turn the raw outputs of a DETR-family detector into detections.

    No in-place writes, no graph breaks, no data-dependent shapes and no host synchronisation: the same module runs in
    eager PyTorch, ``torch.compile``, ``torch.export`` and a CUDA graph, and :mod:`detpost.export` writes it to ONNX.
    All of them choose the same detections.

    Args:
        spec: what the decode does.

    Raises:
        TypeError: a spec that is not a :class:`DecodeSpec`.

    Example:
        >>> post = DetectionPostProcessor(DecodeSpec(top_k=1))
        >>> logits = torch.tensor([[[0.0, 4.0], [1.0, 2.0]]])  # (B=1, Q=2, C=2)
        >>> boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.2, 0.2]]])  # (B, Q, 4), cxcywh
        >>> detections = post(logits, boxes, torch.tensor([[100, 200]]))  # (height, width)
        >>> detections.labels, detections.boxes
        (tensor([[1]]), tensor([[[ 50.,  25., 150.,  75.]]]))
    """

    def __init__(self, spec: DecodeSpec) -> None:
        super().__init__()
        if not isinstance(spec, DecodeSpec):
            raise TypeError(f"spec must be a DecodeSpec; got {type(spec).__name__}: DecodeSpec.preset('rtdetr') is one")
        self.spec = spec
        self._direct = kernels.DirectDecode(spec)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> DetectionPostProcessor:
        """Make the post-processor of a detector family.

        Args:
            name: one of :func:`detpost.presets`.
            overrides: fields of :class:`DecodeSpec` to change.

        Returns:
            The module.

        Raises:
            ValueError: an unknown preset, or a value out of range.
            TypeError: an unknown field.

        Example:
            >>> DetectionPostProcessor.from_preset("detr", top_k=10).spec.activation
            'softmax'
        """
        return cls(DecodeSpec.preset(name, **overrides))

    def forward(self, logits: Tensor, boxes: Tensor, image_sizes: Tensor | None = None) -> Detections:
        """Decode a batch.

        Args:
            logits: (B, Q, C), floating, C at least 1, class logits before any activation.
            boxes: (B, Q, 4), floating, in units of the image, in ``spec.box_format``.
            image_sizes: (B, 2), integer or floating, (height, width) in pixels of each original image; ``None`` leaves
                the boxes normalised.

        Returns:
            Detections with K = min(top_k, Q * C) slots (``per_query``: min(top_k, Q)), ordered by score descending,
            then by query and class ascending. Differentiable in logits and boxes.

        Raises:
            ValueError: shapes that do not fit, or tensors on different devices.
            TypeError: tensors of a wrong dtype.
        """
        return self._at_once().decode(logits, boxes, image_sizes, self._checked)

    def per_image(self, logits: Tensor, boxes: Tensor, image_sizes: Tensor | None = None) -> list[dict[str, Tensor]]:
        """Decode a batch into one dict per image: ``forward(...).to_list()`` without the padded tensors between.

        Args:
            logits: (B, Q, C), as :meth:`forward` takes them.
            boxes: (B, Q, 4).
            image_sizes: (B, 2), (height, width) in pixels of each original image, or ``None``.

        Returns:
            As :meth:`Detections.to_list`: for each image ``scores`` (D,), ``labels`` (D,), ``boxes`` (D, 4) and
            ``queries`` (D,), its D valid detections, best first. Reads on the host how many there are.

        Raises:
            ValueError: shapes that do not fit, or tensors on different devices.
            TypeError: tensors of a wrong dtype.

        Example:
            >>> post = DetectionPostProcessor.from_preset("rtdetr", top_k=2, score_threshold=0.5)
            >>> post.per_image(torch.tensor([[[2.0, -2.0]]]), torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]))[0]["labels"]
            tensor([0])
        """
        return self._at_once().dicts(logits, boxes, image_sizes, self._checked_per_image)

    def _checked(self, logits: Tensor, boxes: Tensor, image_sizes: Tensor | None) -> Detections:
        """Check what is not a plain call, and decode it."""
        _check(logits, boxes, image_sizes)
        return kernels.decode(logits, boxes, image_sizes, self.spec)

    def _checked_per_image(self, logits: Tensor, boxes: Tensor, image_sizes: Tensor | None) -> list[dict[str, Tensor]]:
        return self._checked(logits, boxes, image_sizes).to_list()

    def _at_once(self) -> kernels.DirectDecode:
        if self._direct.spec is not self.spec:
            self._direct = kernels.DirectDecode(self.spec)
        return self._direct

    def extra_repr(self) -> str:
        """Show the spec in ``repr``."""
        return repr(self.spec)


class DetectorModule(nn.Module):
    """A detector with its post-processor behind it: images in, detections out.

    Args:
        model: images (B, 3, H, W) to what :func:`raw_outputs` reads.
        post: the post-processor.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, images):
        ...         return torch.zeros(len(images), 5, 2), torch.full((len(images), 5, 4), 0.5)
        >>> detector = DetectorModule(Model(), DetectionPostProcessor.from_preset("rtdetr", top_k=3))
        >>> detector(torch.zeros(2, 3, 8, 8), torch.tensor([[10, 20], [30, 40]])).boxes.shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, model: nn.Module, post: DetectionPostProcessor) -> None:
        super().__init__()
        self.model: nn.Module = model
        self.post: DetectionPostProcessor = post

    def forward(
        self, images: Tensor, image_sizes: Tensor | None = None, pixel_mask: Tensor | None = None
    ) -> Detections:
        """Detect.

        Args:
            images: (B, 3, H, W), floating, as the model takes them.
            image_sizes: (B, 2), (height, width) of each original image in pixels; ``None`` leaves boxes normalised.
            pixel_mask: (B, H, W), 1 where a padded batch holds image; only for models that take one.

        Returns:
            Detections of the batch.

        Raises:
            TypeError: a model that gives neither a tuple nor a mapping with logits and boxes.
        """
        outputs = self.model(images) if pixel_mask is None else self.model(images, pixel_mask=pixel_mask)
        return cast(Detections, self.post(*raw_outputs(outputs), image_sizes))


def raw_outputs(outputs: Any) -> tuple[Tensor, Tensor]:
    """Read the logits (B, Q, C) and the boxes (B, Q, 4) out of whatever a detector returns.

    Args:
        outputs: a mapping or ModelOutput with ``logits`` or ``pred_logits`` and ``pred_boxes`` or ``boxes``, or a tuple
            (logits, boxes, ...).

    Returns:
        Logits and boxes.

    Raises:
        TypeError: anything else; the message names what came.

    Example:
        >>> logits, boxes = raw_outputs({"pred_logits": torch.zeros(1, 5, 2), "pred_boxes": torch.zeros(1, 5, 4)})
        >>> logits.shape, boxes.shape
        (torch.Size([1, 5, 2]), torch.Size([1, 5, 4]))
    """
    if isinstance(outputs, Mapping):
        logits = next((outputs[name] for name in ("logits", "pred_logits") if name in outputs), None)
        boxes = next((outputs[name] for name in ("pred_boxes", "boxes") if name in outputs), None)
        came = f"a mapping with {', '.join(map(str, outputs))}"
    elif isinstance(outputs, (tuple, list)):
        logits, boxes = (*outputs, None, None)[:2]
        came = f"a {type(outputs).__name__} of {len(outputs)}"
    else:
        logits, boxes, came = None, None, type(outputs).__name__
    if not isinstance(logits, Tensor) or not isinstance(boxes, Tensor):
        raise TypeError(
            f"a detector must return (logits, boxes) or a mapping with logits/pred_logits and pred_boxes; got {came}"
        )
    return logits, boxes


def _check(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None) -> None:
    """Look at shapes, dtypes and devices alone: reading a value would wait for the device."""
    for name, value, last in (("logits", logits, "C"), ("boxes", boxes, "4")):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a floating tensor of shape (B, Q, {last}); got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating; got {value.dtype}: convert with .float()")
        if value.ndim != 3:
            raise ValueError(f"{name} must have shape (B, Q, {last}); got {tuple(value.shape)}")
    if logits.shape[2] == 0:
        raise ValueError(f"logits must have at least one class; got shape {tuple(logits.shape)}")
    if boxes.shape[2] != 4:
        raise ValueError(f"boxes must have shape (B, Q, 4); got {tuple(boxes.shape)}")
    if logits.shape[:2] != boxes.shape[:2]:
        raise ValueError(
            "logits and boxes must agree in images and queries; "
            f"got (B, Q) = {tuple(logits.shape[:2])} and {tuple(boxes.shape[:2])}"
        )
    if boxes.device != logits.device:
        raise ValueError(f"logits are on {logits.device} and boxes on {boxes.device}: move one with .to()")
    if image_sizes is not None:
        _check_image_sizes(logits, image_sizes)


def _check_image_sizes(logits: Tensor, image_sizes: Tensor) -> None:
    # The text is made where it is raised alone: writing a size out would tie torch.compile to this one batch size.
    if not isinstance(image_sizes, Tensor):
        raise TypeError(
            f"image_sizes must be a tensor of shape {_sizes_expected(logits)}; got {type(image_sizes).__name__}: "
            "use torch.tensor"
        )
    if image_sizes.dtype == torch.bool or image_sizes.is_complex():
        raise TypeError(f"image_sizes must be integer or floating; got {image_sizes.dtype}")
    if image_sizes.ndim != 2 or image_sizes.shape[1] != 2 or image_sizes.shape[0] != logits.shape[0]:
        raise ValueError(f"image_sizes must have shape {_sizes_expected(logits)}; got {tuple(image_sizes.shape)}")
    if image_sizes.device != logits.device:
        raise ValueError(f"image_sizes are on {image_sizes.device} and logits on {logits.device}: move one with .to()")


def _sizes_expected(logits: Tensor) -> str:
    return f"(B, 2) = ({logits.shape[0]}, 2), one (height, width) per image"
