"""Images in: whatever the caller has, as uint8 tensors, and the resize and normalisation before the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageSource", "Preprocessing", "read_image"]

ImageSource = "str | Path | Image.Image | np.ndarray[Any, Any] | Tensor"


def read_image(source: Any) -> Tensor:
    """Read an image as RGB.

    Args:
        source: a path; a PIL image of any mode (EXIF orientation applied, 16-bit scaled to 8, palette and grey
            expanded, alpha dropped); a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) in RGB order; a tensor
            (H, W), (1, H, W), (3, H, W) or (4, H, W), uint8, or floating within [0, 1].

    Returns:
        (3, H, W), uint8, on the CPU.

    Raises:
        OSError: a file that is missing or cannot be read as an image.
        TypeError: another kind of object or dtype.
        ValueError: another shape.
    """
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    from PIL import Image

    if isinstance(source, Image.Image):
        return _from_pil(source)
    if isinstance(source, (str, Path)):
        with Image.open(source) as image:
            return _from_pil(image)
    raise TypeError(f"an image must be a path, a PIL image, a uint8 array or a tensor; got {type(source).__name__}")


def _from_pil(image: Image.Image) -> Tensor:
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # convert("RGB") would clip 16-bit values to 255, a white picture.
        values = np.asarray(image).astype(np.float64)
        values = values / 257.0 if values.size and values.max() > 255 else values
        return _from_array(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    # The copy gives torch an array it may own: PIL's buffer is read-only.
    return _from_array(np.array(image.convert("RGB")))


def _from_array(values: np.ndarray[Any, Any]) -> Tensor:
    if values.dtype != np.uint8:
        raise TypeError(f"an image array must be uint8; got {values.dtype}: scale to 0..255 and use .astype('uint8')")
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)) or values.size == 0:
        raise ValueError(
            f"an image array must have shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); got {values.shape}"
        )
    rows = values[:, :, None] if values.ndim == 2 else values
    return _three_channels(torch.from_numpy(np.ascontiguousarray(rows)).permute(2, 0, 1))


def _from_tensor(values: Tensor) -> Tensor:
    planes = values.detach().cpu()
    if planes.ndim == 2:
        planes = planes.unsqueeze(0)
    if planes.ndim != 3 or planes.shape[0] not in (1, 3, 4) or planes.numel() == 0:
        raise ValueError(f"an image tensor must have shape (3, H, W), (1, H, W) or (H, W); got {tuple(values.shape)}")
    if planes.is_floating_point():
        planes = (planes * 255).round().clamp(0, 255).to(torch.uint8)
    if planes.dtype != torch.uint8:
        raise TypeError(f"an image tensor must be uint8, or floating within [0, 1]; got {values.dtype}")
    return _three_channels(planes)


def _three_channels(planes: Tensor) -> Tensor:
    return planes.expand(3, -1, -1).contiguous() if planes.shape[0] == 1 else planes[:3].contiguous()


@dataclass(frozen=True)
class Preprocessing:
    """Resize to one fixed size, scale, normalise: what detectors with a fixed input do.

    Args:
        height: of the network input, pixels.
        width: of the network input, pixels.
        scale: factor from 0..255 to the network's range.
        mean: subtracted from each channel after scaling.
        std: divides each channel afterwards.
    """

    height: int
    width: int
    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __call__(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Prepare a batch.

        Args:
            images: uint8 (3, H, W) each, of any sizes.

        Returns:
            (B, 3, height, width) float32, and (B, 2) int64, the (height, width) of each original image.
        """
        from torchvision.transforms.v2 import functional as vision

        resized = [vision.resize(image, [self.height, self.width], antialias=True) for image in images]
        sizes = torch.tensor([image.shape[-2:] for image in images], dtype=torch.int64).reshape(-1, 2)
        return self.normalise(torch.stack(resized).to(torch.float32)), sizes

    def normalise(self, images: Tensor) -> Tensor:
        """Scale and normalise a batch (B, 3, H, W) of values 0..255, floating; differentiable and exportable."""
        mean, std = ([[[value]] for value in values] for values in (self.mean, self.std))
        scaled = images * self.scale
        return (scaled - scaled.new_tensor(mean)) / scaled.new_tensor(std)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as plain data."""
        return asdict(self)
