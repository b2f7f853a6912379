"""Instance masks: mask logits of the kept queries, upsampled to the image and compared with a threshold.

Two conventions of the field:

- ``rfdetr`` (RF-DETR Seg, ``PostProcess`` of rfdetr 1.11): the network gives logits; they are upsampled bilinearly to
  the image, and a pixel is in the mask where its logit is greater than 0.
- ``dfine_seg`` (D-FINE-seg, ``Torch_model``): the network gives probabilities (it ends in a sigmoid); *they* are
  upsampled, a pixel is in where its probability is at least 0.5, and nothing outside the detection's box is. Where a
  letterbox was used, its padding is cut off before upsampling.

Logits and probabilities interpolate differently: between a pixel that is very sure and one that is slightly unsure, the
logits' zero lies elsewhere than the probabilities' half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detpost.detections import Detections
from detpost.heads._gather import by_query, check, check_sizes

__all__ = ["InstanceMasks", "MaskStyle", "masks_per_image", "to_rle"]

MaskStyle = Literal["rfdetr", "dfine_seg"]

_MAX_BYTES = 64 * 2**20


class InstanceMasks(nn.Module):
    """Masks of one fixed size for the whole batch: the form that compiles, exports and captures.

    For images of different sizes, and wherever not every slot is valid, :func:`masks_per_image` does less work.

    Args:
        height: height of the masks in pixels; for ``dfine_seg`` that of the images, whose pixels the boxes are in.
        width: width likewise.
        style: ``rfdetr`` or ``dfine_seg``, see the module.
        binary: whether to give masks; otherwise the upsampled logits or probabilities, which are differentiable.
        chunk: how many slots to upsample at a time. The floats of one chunk are what is held beside the result.

    Raises:
        ValueError: a size or a chunk below 1, or an unknown style.

    Example:
        >>> from detpost import DetectionPostProcessor
        >>> post, masks = DetectionPostProcessor.from_preset("rfdetr", top_k=1), InstanceMasks(4, 4)
        >>> found = post(torch.tensor([[[2.0], [0.0]]]), torch.full((1, 2, 4), 0.5), torch.tensor([[4, 4]]))
        >>> logits = torch.tensor([[[[1.0, -1.0], [-1.0, -1.0]], [[1.0, 1.0], [1.0, 1.0]]]])  # (B, Q, h, w)
        >>> masks(found, logits)[0, 0].int()
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 0, 0],
                [0, 0, 0, 0]], dtype=torch.int32)
    """

    def __init__(
        self, height: int, width: int, style: MaskStyle = "rfdetr", binary: bool = True, chunk: int = 32
    ) -> None:
        super().__init__()
        for name, value in (("height", height), ("width", width), ("chunk", chunk)):
            _check_positive(name, value)
        _check_style(style)
        self.height, self.width, self.style, self.binary, self.chunk = height, width, style, binary, chunk

    def forward(self, detections: Detections, mask_logits: Tensor) -> Tensor:
        """Make the masks.

        Args:
            detections: of B images in K slots; boxes in pixels where the style crops.
            mask_logits: (B, Q, h, w), floating: logits, or probabilities for ``dfine_seg``.

        Returns:
            (B, K, height, width), bool, or float32 (float64 from float64) where not ``binary``; zero in slots that are
            not valid.

        Raises:
            ValueError: shapes that do not fit, or tensors on different devices.
            TypeError: no Detections, or mask logits that are not floating.
        """
        check(detections, mask_logits, "mask_logits", {4: "(B, Q, h, w)"})
        _check_area(mask_logits)
        dtype = torch.promote_types(mask_logits.dtype, torch.float32)
        parts = []
        for start in range(0, detections.queries.shape[1], self.chunk):
            slots = slice(start, start + self.chunk)
            values = by_query(mask_logits, detections.queries[:, slots]).to(dtype)
            # A slot that is not valid reads 0, and so does its gradient whatever its row of the network holds.
            is_valid = detections.valid[:, slots, None, None]
            upsampled = F.interpolate(
                torch.where(is_valid, values, 0.0), size=(self.height, self.width), mode="bilinear", align_corners=False
            )
            if not self.binary and self.style == "rfdetr":
                parts.append(upsampled)
            else:
                keep = is_valid
                if self.style == "dfine_seg":
                    keep = keep & self._inside(detections.boxes[:, slots])
                if self.binary:
                    parts.append((upsampled >= 0.5 if self.style == "dfine_seg" else upsampled > 0) & keep)
                else:
                    parts.append(torch.where(keep, upsampled, 0.0))
        if not parts:
            batch = mask_logits.shape[0]
            return mask_logits.new_zeros(
                (batch, 0, self.height, self.width), dtype=torch.bool if self.binary else dtype
            )
        return torch.cat(parts, dim=1)

    def _inside(self, boxes: Tensor) -> Tensor:
        """Say which pixels lie in their box: boxes (B, n, 4) -> (B, n, height, width)."""
        left, top, right, bottom = boxes.detach()[..., None, None].unbind(2)  # (B, n, 1, 1) each
        x = torch.arange(self.width, device=boxes.device)
        y = torch.arange(self.height, device=boxes.device).unsqueeze(1)
        return (x >= left) & (x < right) & (y >= top) & (y < bottom)

    def extra_repr(self) -> str:
        """Show the arguments in ``repr``."""
        return f"{self.height}, {self.width}, style={self.style!r}, binary={self.binary}, chunk={self.chunk}"


def masks_per_image(
    detections: Detections,
    mask_logits: Tensor,
    image_sizes: Tensor | Sequence[tuple[int, int]],
    *,
    style: MaskStyle = "rfdetr",
    input_size: tuple[int, int] | None = None,
    max_bytes: int = _MAX_BYTES,
) -> list[Tensor]:
    """Make the masks of the valid detections, each image in its own size: the host's edge, like ``to_list``.

    Reads the sizes and which slots are valid. Nothing is upsampled for a slot that is not, and on a CPU the full-size
    floats are never stored, so beside the result it holds about ``max_bytes``.

    Args:
        detections: of B images in K slots; boxes in pixels where the style crops.
        mask_logits: (B, Q, h, w), floating: logits, or probabilities for ``dfine_seg``.
        image_sizes: (B, 2), (height, width) in pixels of each original image, a tensor of whole numbers or pairs.
        style: ``rfdetr`` or ``dfine_seg``, see the module.
        input_size: (height, width) of the network's input where the image was letterboxed into it with the padding
            on both sides (D-FINE-seg's ``keep_ratio``); ``None``: the image was stretched.
        max_bytes: bound on what is held beside the result, as long as one mask fits into it.

    Returns:
        For each image (D, 1, height, width), bool, its D valid detections in the order of ``to_list``.

    Raises:
        ValueError: shapes that do not fit, sizes below 1, an unknown style, or tensors on different devices.
        TypeError: no Detections, or tensors of a wrong dtype.

    Example:
        >>> from detpost import DetectionPostProcessor
        >>> post = DetectionPostProcessor.from_preset("rfdetr", top_k=2, score_threshold=0.7)
        >>> sizes = torch.tensor([[4, 6]])
        >>> found = post(torch.tensor([[[2.0], [0.0]]]), torch.full((1, 2, 4), 0.5), sizes)
        >>> [masks.shape for masks in masks_per_image(found, torch.randn(1, 2, 3, 3), sizes)]
        [torch.Size([1, 1, 4, 6])]
    """
    from detpost.kernels.cpu.mask_upsampling import upsample_and_compare

    check(detections, mask_logits, "mask_logits", {4: "(B, Q, h, w)"})
    _check_area(mask_logits)
    _check_style(style)
    _check_positive("max_bytes", max_bytes)
    is_dfine = style == "dfine_seg"
    masks = []
    for image, (height, width) in enumerate(_host_sizes(detections, image_sizes)):
        valid = detections.valid[image]
        values = mask_logits[image].detach().index_select(0, detections.queries[image][valid])  # (D, h, w)
        if input_size is not None:
            values = _cut_letterbox(values, (height, width), input_size)
        boxes = detections.boxes[image][valid].detach() if is_dfine else None
        threshold = 0.5 if is_dfine else 0.0
        masks.append(upsample_and_compare(values, (height, width), threshold, is_dfine, max_bytes, boxes))
    return masks


def to_rle(masks: Tensor | npt.NDArray[Any]) -> list[dict[str, Any]]:
    """Encode masks as COCO's compressed run lengths, without pycocotools.

    Args:
        masks: (N, H, W) or (N, 1, H, W), bool or uint8, on any device; what is not 0 is in the mask.

    Returns:
        For each mask ``{"size": [H, W], "counts": bytes}``, equal to ``pycocotools.mask.encode``. For JSON the counts
        are to be decoded: ``counts.decode()``.

    Raises:
        TypeError: masks that are neither bool nor uint8.
        ValueError: another shape.

    Source:
        ``rleEncode`` and ``rleToString`` of the COCO API (maskApi.c).

    Example:
        >>> to_rle(torch.tensor([[[0, 1], [1, 1]]]).bool())
        [{'size': [2, 2], 'counts': b'13'}]
    """
    from detpost.kernels.cpu.run_lengths import run_lengths

    array: npt.NDArray[Any] = masks.detach().cpu().numpy() if isinstance(masks, Tensor) else np.asarray(masks)
    if array.dtype not in (np.dtype(bool), np.dtype(np.uint8)):
        raise TypeError(f"masks must be bool or uint8; got {array.dtype}: logits are to be compared with 0 first")
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 3:
        raise ValueError(f"masks must have shape (N, H, W) or (N, 1, H, W); got {tuple(array.shape)}")
    size = [int(extent) for extent in array.shape[1:]]
    return [{"size": list(size), "counts": counts} for counts in run_lengths(array)]


def mask_of_rle(counts: str, size: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Decode COCO's compressed run lengths.

    Args:
        counts: as JSON holds them.
        size: (height, width).

    Returns:
        (height, width).

    Source:
        ``rleFrString`` of the COCO API (maskApi.c).
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode("ascii"):
        bits = character - 48
        value, shift = value | (bits & 0x1F) << shift, shift + 5
        if bits & 0x20:
            continue
        if bits & 0x10:  # negative
            value = value - (1 << shift)
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))  # from the fourth on as differences to the last but one
        value = shift = 0
    height, width = size
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


def _cut_letterbox(values: Tensor, image_size: tuple[int, int], input_size: tuple[int, int]) -> Tensor:
    """Cut the letterbox's padding off masks (D, h, w), to whole mask pixels, as D-FINE-seg does."""
    sides = []
    gain = min(given / original for given, original in zip(input_size, image_size, strict=True))
    for given, original, extent in zip(input_size, image_size, values.shape[1:], strict=True):
        padding = max(round((given - original * gain) / 2 - 0.1), 0)
        first, last = int(padding * (extent / given)), int((given - padding) * (extent / given))
        sides.append(slice(first, max(last, first + 1)))
    return values[:, sides[0], sides[1]]


def _host_sizes(detections: Detections, image_sizes: Tensor | Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    if isinstance(image_sizes, Tensor):
        check_sizes(detections, image_sizes.to(detections.queries.device))
        image_sizes = image_sizes.tolist()
    if len(image_sizes) != len(detections.queries):
        raise ValueError(f"image_sizes must have one (height, width) per image; got {len(image_sizes)} of them")
    sizes = [(int(height), int(width)) for height, width in image_sizes]
    if any(extent < 1 for size in sizes for extent in size):
        raise ValueError(f"image_sizes must be at least 1 by 1 pixel; got {sizes}")
    return sizes


def _check_area(mask_logits: Tensor) -> None:
    if 0 in mask_logits.shape[2:]:
        raise ValueError(f"mask_logits must have at least one pixel; got shape {tuple(mask_logits.shape)}")


def _check_style(style: str) -> None:
    if style not in get_args(MaskStyle):
        raise ValueError(f"style must be one of {', '.join(get_args(MaskStyle))}; got {style!r}")


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
