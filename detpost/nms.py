"""Exact greedy non-maximum suppression with static shapes.

DETR-family detectors need none: their queries compete inside the network. It is an option for those whose training did
not quite teach that (few epochs, one-to-many heads, tiled images).

Greedy suppression walks down the scores and keeps a box unless a kept one before it overlaps it too much. That is a
recursion of K steps that no parallel scheme shortens (finding the same set is P-complete), but a step need not be one
box: here it is eight, looked up in tables that are made for all blocks at once. Shapes and control flow depend on K
alone, so the same graph is compiled, exported and captured, and is exact for every input.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detpost.detections import Detections
from detpost.selection import select_top_k

__all__ = ["NonMaximumSuppression", "nms"]

_WORD = 8  # boxes per step: one byte of a mask each, so eight of them are one int64
_EXPORT_WORD = 6
# Tables grow with the square of what they cover: longer lists are walked in chunks of about this many boxes.
_CHUNK = 320


def nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Say which boxes greedy non-maximum suppression keeps.

    Boxes are taken by score descending, then index ascending, NaN scores last; a box is dropped where its IoU with a
    kept one before it (of the same label) is greater than the threshold. Equal to ``torchvision.ops.nms`` of each image
    and label apart, on the CPU, bit for bit of the IoU: a box whose IoU is not a number (zero areas, NaN, infinities)
    neither drops another nor is dropped.

    Args:
        boxes: (B, N, 4), floating, xyxy in any unit; compared as float32, or float64 if they are.
        scores: (B, N), floating.
        iou_threshold: in [0, 1].
        labels: (B, N), integer; boxes of different labels never drop each other. ``None``: one class.
        valid: (B, N), bool; boxes that are not valid drop none and are not kept. ``None``: all are.

    Returns:
        (B, N), bool, in the order of ``boxes``. Carries no gradient.

    Raises:
        TypeError: tensors of a wrong dtype, or a threshold that is no number.
        ValueError: shapes that do not fit, tensors on different devices, or a threshold outside [0, 1].

    Source:
        Neubeck and Van Gool, "Efficient Non-Maximum Suppression", ICPR 2006.

    Example:
        >>> boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [20.0, 0.0, 30.0, 10.0]]])
        >>> nms(boxes, torch.tensor([[0.8, 0.9, 0.3]]), iou_threshold=0.5)
        tensor([[False,  True,  True]])
    """
    _check(boxes, scores, labels, valid)
    threshold = _checked_threshold(iou_threshold)
    order = select_top_k(scores, max(1, int(scores.shape[1])))  # (B, N)
    keep = _greedy(
        boxes.detach().gather(1, order.unsqueeze(-1).expand(-1, -1, 4)),
        None if labels is None else labels.gather(1, order),
        torch.ones_like(scores, dtype=torch.bool) if valid is None else valid.gather(1, order),
        threshold,
    )
    return torch.zeros_like(keep).scatter(1, order, keep)


class NonMaximumSuppression(nn.Module):
    """Clear ``valid`` of the detections that greedy non-maximum suppression drops: Detections in, Detections out.

    Slots are taken in their order, which is best first as every post-processor here gives them. Scores and boxes stay
    differentiable.

    Args:
        iou_threshold: a detection is dropped where its IoU with a kept one before it is greater; in [0, 1].
        class_agnostic: whether detections of different labels drop each other too.
        compact: move what is kept to the front, its order unchanged; otherwise every detection stays in its slot.

    Raises:
        TypeError: a threshold that is no number.
        ValueError: a threshold outside [0, 1].

    Example:
        >>> from detpost import DecodeSpec, DetectionPostProcessor
        >>> post = DetectionPostProcessor(DecodeSpec(top_k=2))
        >>> suppress = NonMaximumSuppression(0.7)
        >>> logits, boxes = torch.tensor([[[2.0], [1.0]]]), torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]]])
        >>> suppress(post(logits, boxes)).valid
        tensor([[ True, False]])
    """

    def __init__(self, iou_threshold: float, class_agnostic: bool = False, compact: bool = False) -> None:
        super().__init__()
        self._threshold = _checked_threshold(iou_threshold)
        self.iou_threshold = iou_threshold
        self.class_agnostic = class_agnostic
        self.compact = compact

    def forward(self, detections: Detections) -> Detections:
        """Suppress.

        Args:
            detections: of B images in K slots, best first.

        Returns:
            Detections of the same shapes; slots that are not valid read score 0, label -1, query -1, box 0 0 0 0.

        Raises:
            TypeError: anything but Detections.
        """
        if not isinstance(detections, Detections):
            raise TypeError(
                f"detections must be Detections; got {type(detections).__name__}: detpost.nms.nms takes plain tensors"
            )
        labels = None if self.class_agnostic else detections.labels
        keep = _greedy(detections.boxes.detach(), labels, detections.valid, self._threshold)
        if self.compact:
            places = int(keep.shape[1])
            slot = torch.arange(places, dtype=torch.int32, device=keep.device)
            # Unique integers: any runtime's top-k gives the one order.
            order = torch.where(keep, 2 * places - slot, places - slot).topk(places, dim=1).indices
            corners = detections.boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
            scores, labels, queries = (
                values.gather(1, order) for values in (detections.scores, detections.labels, detections.queries)
            )
            keep = keep.gather(1, order)
        else:
            scores, labels, corners, queries, _ = detections
        return Detections(
            scores=torch.where(keep, scores, 0.0),
            labels=torch.where(keep, labels, -1),
            boxes=torch.where(keep.unsqueeze(-1), corners, 0.0),
            queries=torch.where(keep, queries, -1),
            valid=keep,
        )

    def extra_repr(self) -> str:
        """Show the arguments in ``repr``."""
        return f"{self.iou_threshold}, class_agnostic={self.class_agnostic}, compact={self.compact}"


def _greedy(boxes: Tensor, labels: Tensor | None, valid: Tensor, threshold: float) -> Tensor:
    """Walk boxes (B, K, 4) that come best first, in chunks; give the kept ones (B, K)."""
    places = int(boxes.shape[1])  # a number while tracing, too: the walk is unrolled
    if places == 0:
        return valid.clone()
    width = -(-places // -(-places // _CHUNK))
    sides = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).permute(2, 0, 1).contiguous()  # (4, B, K)
    walk = _walk_portable if torch.onnx.is_in_onnx_export() else _walk_words
    kept: list[Tensor] = []
    free = valid  # (B, K - start): valid, and not dropped by an earlier chunk
    for start in range(0, places, width):
        size = min(width, places - start)
        rest = slice(start, places)
        overlaps = _overlaps(
            sides[:, :, start : start + size],
            sides[:, :, rest],
            None if labels is None else labels[:, start : start + size],
            None if labels is None else labels[:, rest],
            threshold,
        )  # (B, size, K - start)
        keep = walk(overlaps[:, :, :size], free[:, :size])
        kept.append(keep)
        if start + size < places:
            drops = (overlaps[:, :, size:] & keep.unsqueeze(-1)).any(dim=1)
            free = free[:, size:] & ~drops
    return torch.cat(kept, dim=1)


def _overlaps(
    first: Tensor, second: Tensor, first_labels: Tensor | None, second_labels: Tensor | None, threshold: float
) -> Tensor:
    """Say which pairs of boxes (4, B, n), (4, B, m) overlap by more than the threshold: (B, n, m).

    The same operations in the same order as torchvision's, so that an IoU at the threshold falls on the same side.
    """
    left, top, right, bottom = first.unsqueeze(-1).unbind(0)
    other_left, other_top, other_right, other_bottom = second.unsqueeze(-2).unbind(0)
    width = (torch.minimum(right, other_right) - torch.maximum(left, other_left)).clamp(min=0)
    height = (torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)).clamp(min=0)
    shared = width * height
    area = (right - left) * (bottom - top)
    other_area = (other_right - other_left) * (other_bottom - other_top)
    overlaps = shared / (area + other_area - shared) > _below(threshold, shared.dtype)
    if first_labels is None or second_labels is None:
        return overlaps
    return overlaps & (first_labels.unsqueeze(-1) == second_labels.unsqueeze(-2))


def _walk_words(overlaps: Tensor, free: Tensor) -> Tensor:
    """Solve keep[i] = free[i] and no kept j < i overlaps i, eight boxes a step: overlaps (B, n, n), free (B, n).

    Eight boxes are the bits of one word. Two tables hold, for each block of eight, which of them stay when a given set
    of them is dropped already (256 entries), and which boxes of the whole list a given set of them drops (256 rows of
    words). A step reads its block's word, looks up both, and drops: nothing in it depends on how long a chain of
    overlaps is.
    """
    batch, size = overlaps.shape[0], int(overlaps.shape[1])
    blocks = -(-size // _WORD)
    padding = blocks * _WORD - size
    drops = _words(F.pad(overlaps, (0, padding, 0, padding))).view(batch, blocks, _WORD, blocks)
    dropped = _words(F.pad(~free, (0, padding), value=True))  # (B, blocks)
    entry = torch.arange(2**_WORD, dtype=torch.int32, device=overlaps.device).to(torch.uint8)

    own = drops.diagonal(dim1=1, dim2=3)  # (B, 8, blocks): whom each box drops in its own block
    state, stays = entry.expand(batch, blocks, 2**_WORD), torch.zeros_like(entry)
    for bit in range(_WORD):
        stay = ((state >> bit) & 1) ^ 1
        stays = stays | (stay << bit)
        state = state | (own[:, bit].unsqueeze(-1) * stay)
    # Indices into all blocks of all images, so that a step is two plain look-ups.
    block = torch.arange(batch * blocks, dtype=torch.int32, device=overlaps.device).view(batch, blocks) * 2**_WORD
    stays = (stays + block.unsqueeze(-1)).flatten()
    effects = _unions(drops).reshape(batch * blocks * 2**_WORD, blocks)

    kept = []
    for step, first in enumerate(block.unbind(1)):
        chosen = stays.index_select(0, first + dropped[:, step])  # (B,), int32
        kept.append(chosen)
        dropped = dropped | effects.index_select(0, chosen)
    bits = torch.arange(_WORD, dtype=torch.int32, device=overlaps.device)
    keep = (torch.stack(kept, dim=1).unsqueeze(-1) >> bits) & 1  # (B, blocks, 8)
    return keep.view(batch, blocks * _WORD)[:, :size] == 1


def _words(mask: Tensor) -> Tensor:
    """Pack (..., 8 n) booleans into (..., n) bytes, the first in the lowest bit."""
    # Eight bytes of 0 or 1 read as one integer; the product brings byte i to bit 56 + i, with no two in one place.
    gathered = mask.contiguous().view(torch.int64) * 0x0102040810204080
    return ((gathered >> 56) & 0xFF).to(torch.uint8)


def _unions(drops: Tensor) -> Tensor:
    """Union the words of every subset of each block: (B, blocks, 8, m) -> (B, blocks, 256, m)."""
    tables = drops.unsqueeze(3)  # (B, blocks, 8 groups, 1 subset without the empty one, m)
    tables = torch.cat((torch.zeros_like(tables), tables), dim=3)
    while tables.shape[2] > 1:
        lower, upper = tables[:, :, 0::2], tables[:, :, 1::2]
        tables = (upper.unsqueeze(4) | lower.unsqueeze(3)).flatten(3, 4)
    return tables[:, :, 0]


def _walk_portable(overlaps: Tensor, free: Tensor) -> Tensor:
    """Solve the same with float32 operators alone, for runtimes without bitwise ones: the exported form.

    Args and returns as :func:`_walk_words`.
    """
    batch, size = overlaps.shape[0], int(overlaps.shape[1])
    blocks = -(-size // _EXPORT_WORD)
    padding = blocks * _EXPORT_WORD - size
    # Not F.pad: ONNX pads no booleans before opset 19.
    drops = F.pad(overlaps.to(torch.float32), (0, padding, 0, padding))
    hits = F.pad((~free).to(torch.float32), (0, padding), value=1.0)  # how many kept boxes drop each one
    weights = 2.0 ** torch.arange(_EXPORT_WORD, device=overlaps.device)
    entry = torch.arange(2**_EXPORT_WORD, device=overlaps.device)
    stays: list[Tensor] = []  # (B, blocks, 64) for each place in a block
    own = torch.stack(
        [drops[:, i : i + _EXPORT_WORD, i : i + _EXPORT_WORD] for i in range(0, blocks * _EXPORT_WORD, _EXPORT_WORD)],
        dim=1,
    )  # (B, blocks, 6, 6)
    for bit in range(_EXPORT_WORD):
        gone = (entry // 2**bit % 2).to(torch.float32).expand(batch, blocks, -1)
        for earlier, stay in enumerate(stays):
            gone = gone + stay * own[:, :, earlier, bit].unsqueeze(-1)
        stays.append((gone == 0).to(torch.float32))
    table = torch.stack(stays, dim=-1)  # (B, blocks, 64, 6)
    kept = []
    for step in range(blocks):
        places = slice(step * _EXPORT_WORD, (step + 1) * _EXPORT_WORD)
        entry = ((hits[:, places] > 0).to(torch.float32) * weights).sum(dim=1).to(torch.int64)  # (B,)
        chosen = table[:, step].gather(1, entry.view(-1, 1, 1).expand(-1, 1, _EXPORT_WORD))  # (B, 1, 6)
        kept.append(chosen[:, 0])
        hits = hits + (chosen @ drops[:, places])[:, 0]
    return torch.cat(kept, dim=1)[:, :size] > 0


def _checked_threshold(iou_threshold: float) -> float:
    if isinstance(iou_threshold, bool) or not isinstance(iou_threshold, (int, float)):
        raise TypeError(f"iou_threshold must be a number in [0, 1]; got {iou_threshold!r}")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in [0, 1]; got {iou_threshold}")
    return float(iou_threshold)


def _below(threshold: float, dtype: torch.dtype) -> float:
    """Give the greatest number of ``dtype`` not above: comparing floats with it is comparing them as doubles.

    torchvision compares a float32 IoU with the double threshold, torch with the threshold rounded to float32.
    """
    if dtype == torch.float64:
        return threshold
    nearest = np.float32(threshold)
    return float(np.nextafter(nearest, np.float32(-1)) if float(nearest) > threshold else nearest)


def _check(boxes: Tensor, scores: Tensor, labels: Tensor | None, valid: Tensor | None) -> None:
    for name, value, shape in (("boxes", boxes, "(B, N, 4)"), ("scores", scores, "(B, N)")):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating tensor of shape {shape}; got {what}")
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise ValueError(
            f"boxes must have shape (B, N, 4); got {tuple(boxes.shape)}: unsqueeze(0) makes one image a batch"
        )
    if labels is not None and (not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex()):
        what = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an integer tensor of shape (B, N); got {what}")
    if valid is not None and (not isinstance(valid, Tensor) or valid.dtype != torch.bool):
        what = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"valid must be a bool tensor of shape (B, N); got {what}")
    for name, values in (("scores", scores), ("labels", labels), ("valid", valid)):
        if values is None:
            continue
        if values.shape != boxes.shape[:2]:
            raise ValueError(f"{name} must have shape (B, N) = {tuple(boxes.shape[:2])}; got {tuple(values.shape)}")
        if values.device != boxes.device:
            raise ValueError(f"{name} are on {values.device} and boxes on {boxes.device}: move one with .to()")
