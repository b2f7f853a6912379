"""Images in: whatever the caller has, as uint8 tensors, and the resize and normalisation before the network."""

from __future__ import annotations

import contextlib
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from detpost.image_files import STRIP_PIXELS, UprightImage, open_image

__all__ = ["ImageSource", "Preprocessing", "read_image"]

# What takes an image whole (a picture to draw on, a processor of another library) gets one above this shrunk.
MOST_PIXELS = 2**26

ImageSource = "str | Path | Image.Image | np.ndarray[Any, Any] | Tensor"


class Rows(Protocol):
    """An image that gives its pixels a strip of rows at a time."""

    @property
    def height(self) -> int:
        """Pixels."""

    @property
    def width(self) -> int:
        """Pixels."""

    @property
    def strip(self) -> int:
        """About how many pixels are best asked for at once."""

    def rows(self, top: int, bottom: int) -> Tensor:
        """Give (3, bottom - top, width), uint8, on the CPU."""


class FileRows:
    """The rows of a decoded image file, channels last as they lie there: the resize is several times faster so."""

    strip = STRIP_PIXELS // 4  # what it copies stays near the processor then

    def __init__(self, image: UprightImage) -> None:
        self._image = image
        self.height, self.width = image.height, image.width

    def rows(self, top: int, bottom: int) -> Tensor:
        """Give (3, bottom - top, width), uint8."""
        return torch.from_numpy(self._image.rows(top, bottom)).permute(2, 0, 1)


class TensorRows:
    """The rows of an image that lies in memory whole: (3, H, W), uint8."""

    strip = STRIP_PIXELS

    def __init__(self, image: Tensor) -> None:
        self._image = image
        self.height, self.width = image.shape[-2:]

    def rows(self, top: int, bottom: int) -> Tensor:
        """Give (3, bottom - top, width), uint8."""
        return self._image[:, top:bottom]


@contextlib.contextmanager
def opened(source: Any, max_pixels: int | None = None) -> Iterator[Rows]:
    """Open an image to take its rows.

    Args:
        source: as :func:`read_image` takes it.
        max_pixels: as :func:`read_image` takes it.

    Yields:
        The image.

    Raises:
        OSError, TypeError, ValueError: as of :func:`read_image`.
    """
    if isinstance(source, (str, Path)):
        with open_image(source, max_pixels) as image:
            yield FileRows(UprightImage(image))
    else:
        yield TensorRows(_from_memory(source))


def read_image(source: Any, max_pixels: int | None = None) -> Tensor:
    """Read an image as RGB.

    Args:
        source: a path; a PIL image of any mode (EXIF orientation applied, 16-bit and deeper scaled to 8, palette, grey
            and CMYK converted, alpha dropped, the first frame of an animation); a uint8 array (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4) in RGB order; a tensor (H, W), (1, H, W), (3, H, W) or (4, H, W), uint8, or floating
            within [0, 1].
        max_pixels: most pixels that a file may say it has; a larger one is refused before it is decoded. ``None``
            leaves it to Pillow's own limit, twice ``PIL.Image.MAX_IMAGE_PIXELS``.

    Returns:
        (3, H, W), uint8, on the CPU.

    Raises:
        OSError: a file that is missing, too large or cannot be read as an image, in one line that names it.
        TypeError: another kind of object or dtype.
        ValueError: another shape.

    Example:
        >>> read_image(np.zeros((4, 6), np.uint8)).shape
        torch.Size([3, 4, 6])
    """
    with opened(source, max_pixels) as image:
        return image.rows(0, image.height).contiguous()


def _from_memory(source: Any) -> Tensor:
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    from PIL import Image

    if isinstance(source, Image.Image):
        image = UprightImage(source)
        return _from_array(image.rows(0, image.height))
    raise TypeError(f"an image must be a path, a PIL image, a uint8 array or a tensor; got {type(source).__name__}")


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


def resize(image: Rows, height: int, width: int) -> Tensor:
    """Resize an image, antialiased, to the bit as torchvision resizes it whole, in memory for a few strips of it.

    Args:
        image: of any size.
        height: wanted.
        width: wanted.

    Returns:
        (3, height, width), uint8, on the CPU.
    """
    from torchvision.transforms.v2 import functional as vision

    size = image.strip if _resizes_bytes() else STRIP_PIXELS
    if image.height * image.width <= size:
        return vision.resize(image.rows(0, image.height), [height, width], antialias=True)  # type: ignore[no-any-return]
    step = max(1, size // image.width)
    strips = (image.rows(top, min(top + step, image.height)) for top in range(0, image.height, step))
    # The filter is separable and goes along the rows first: no row needs its neighbours until all have their new width.
    if _resizes_bytes():
        narrow = torch.cat([vision.resize(strip, [strip.shape[1], width], antialias=True) for strip in strips], 1)
        return vision.resize(narrow, [height, width], antialias=True)  # type: ignore[no-any-return]
    floats = torch.cat([_interpolate(strip.to(torch.float32), strip.shape[1], width) for strip in strips], 1)
    return _interpolate(floats, height, width).round().to(torch.uint8)


def _interpolate(image: Tensor, height: int, width: int) -> Tensor:
    return torch.nn.functional.interpolate(image[None], [height, width], mode="bilinear", antialias=True)[0]


def _resizes_bytes() -> bool:
    """Tell whether torchvision resizes uint8 as it is on this processor, rounding between the two directions."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in ("aarch64", "arm64")


def shrunk(image: Rows, times: int) -> Tensor:
    """Give an image by a whole number smaller: (3, H // times, W // times), at least one pixel, uint8."""
    return resize(image, max(1, image.height // times), max(1, image.width // times))


class PreparedImage(NamedTuple):
    """One image as a network takes it, but for what is done to a whole batch.

    Args:
        pixels: (3, h, w).
        size: (height, width) of the original image, pixels.
        mask: (h, w), which pixels are no padding; ``None`` where there is no padding.
    """

    pixels: Tensor
    size: tuple[int, int]
    mask: Tensor | None = None


class Prepare(ABC):
    """What is done to images before the network: to each alone, which any thread may do, and to the batch."""

    @property
    def input_size(self) -> tuple[int, int] | None:
        """The (height, width) that every image is resized to, pixels; ``None`` where that is up to the image."""
        return None

    @abstractmethod
    def one(self, image: Rows) -> PreparedImage:
        """Do what can be done to an image alone."""

    @abstractmethod
    def batch(self, images: Sequence[PreparedImage]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Bring images together.

        Args:
            images: of :meth:`one`, at least one.

        Returns:
            (B, 3, h, w) float32; (B, 2) int64, the (height, width) of each original image; and (B, h, w), which pixels
            are no padding, or ``None``.
        """

    def __call__(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Prepare uint8 images (3, H, W) of any sizes; as :meth:`batch`."""
        return self.batch([self.one(TensorRows(image)) for image in images])


def sizes_of(images: Sequence[PreparedImage]) -> Tensor:
    """Give the (height, width) of each original image, (B, 2) int64."""
    return torch.tensor([image.size for image in images], dtype=torch.int64, device="cpu").reshape(-1, 2)


@dataclass(frozen=True)
class Preprocessing:
    """Resize to one fixed size, scale, normalise: what detectors with a fixed input do.

    Args:
        height: of the network input, pixels.
        width: of the network input, pixels.
        scale: factor from 0..255 to the network's range.
        mean: subtracted from each channel after scaling.
        std: divides each channel afterwards; above 0.

    Raises:
        ValueError: a mean that is not finite, or a deviation that is not above 0.
    """

    height: int
    width: int
    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        """Refuse what no pixel could be normalised with."""
        if not all(map(isfinite, self.mean)):
            raise ValueError(f"mean must hold finite numbers; got {self.mean}")
        if not all(isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std must hold finite numbers above 0; got {self.std}")

    def __call__(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Prepare a batch.

        Args:
            images: uint8 (3, H, W) each, of any sizes.

        Returns:
            (B, 3, height, width) float32, and (B, 2) int64, the (height, width) of each original image.
        """
        batch, sizes, _ = FixedSize(self)(images)
        return batch, sizes

    def normalise(self, images: Tensor) -> Tensor:
        """Scale and normalise a batch; differentiable and exportable.

        Args:
            images: (B, 3, H, W) or (3, H, W), floating, values 0..255.

        Returns:
            The same shape and dtype, as the network takes it.
        """
        mean, std = ([[[value]] for value in values] for values in (self.mean, self.std))
        scaled = images * self.scale
        return (scaled - scaled.new_tensor(mean)) / scaled.new_tensor(std)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as plain data.

        Returns:
            A dict that :mod:`json` can write.
        """
        return asdict(self)


class Untouched(Prepare):
    """Images as they are, for a network that resizes itself: a batch of one, since sizes differ."""

    def one(self, image: Rows) -> PreparedImage:
        """Take an image whole; it stays uint8."""
        return PreparedImage(image.rows(0, image.height), (image.height, image.width))

    def batch(self, images: Sequence[PreparedImage]) -> tuple[Tensor, Tensor, None]:
        """Bring images of one size together, as uint8."""
        return torch.stack([image.pixels for image in images]).contiguous(), sizes_of(images), None


class FixedSize(Prepare):
    """Every image to one size.

    Args:
        preprocessing: which, and how it is scaled and normalised.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    @property
    def input_size(self) -> tuple[int, int]:
        """The (height, width) that every image is resized to, pixels."""
        return self.preprocessing.height, self.preprocessing.width

    def one(self, image: Rows) -> PreparedImage:
        """Resize an image; it stays uint8."""
        pixels = resize(image, self.preprocessing.height, self.preprocessing.width)
        return PreparedImage(pixels, (image.height, image.width))

    def batch(self, images: Sequence[PreparedImage]) -> tuple[Tensor, Tensor, None]:
        """Scale and normalise a batch."""
        # Planes, whatever the images came as: a network computes other last places on channels that lie last. One image
        # after the other: memory of a batch's size is new to the process at each step, and takes longer than the step.
        planes = (image.pixels.contiguous().to(torch.float32) for image in images)
        return torch.stack([self.preprocessing.normalise(each) for each in planes]), sizes_of(images), None
