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

_TIFF_PHOTOMETRIC = 262

ImageSource = "str | Path | Image.Image | np.ndarray[Any, Any] | Tensor"


def read_image(source: Any, max_pixels: int | None = None) -> Tensor:
    """Read an image as RGB.

    Args:
        source: a path; a PIL image of any mode (EXIF orientation applied, 16-bit and deeper scaled to 8, palette, grey
            and CMYK converted, alpha dropped, the first frame of an animation); a uint8 array (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4) in RGB order; a tensor (H, W), (1, H, W), (3, H, W) or (4, H, W), uint8, or floating
            within [0, 1].
        max_pixels: most pixels that a file may say it has; a larger one is refused before it is decoded. ``None``
            leaves it to Pillow's own limit, twice ``PIL.Image.MAX_IMAGE_PIXELS``, which holds beside this one.

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
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    from PIL import Image

    if isinstance(source, Image.Image):
        return _from_array(_pixels(source))
    if isinstance(source, (str, Path)):
        return _from_array(_decode_file(source, max_pixels))
    raise TypeError(f"an image must be a path, a PIL image, a uint8 array or a tensor; got {type(source).__name__}")


def _decode_file(path: str | Path, max_pixels: int | None) -> np.ndarray[Any, Any]:
    """Decode a file; whatever goes wrong in a decoder is an OSError of one line that names the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise OSError(f"{image.width} x {image.height} pixels are more than {max_pixels}")
            return _pixels(image)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except UnidentifiedImageError:
        reason = "not an image of a known format" if Path(path).stat().st_size else "the file is empty"
    except MemoryError:
        reason = "not enough memory for its pixels"
    # On broken files Pillow's decoders raise SyntaxError, struct.error, zlib.error, EOFError, KeyError and more.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    raise OSError(f"cannot read image {str(path)!r}: {reason}")


def _pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    """Give the pixels of an image of any mode, (H, W) or (H, W, 3), uint8."""
    from PIL import ImageOps

    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    white_is_zero = deep and getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == 0  # Pillow inverts 8 bits alone
    scaled_to_16_bits = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    image = ImageOps.exif_transpose(image)
    if deep:
        # convert("RGB") would clip deep values to 255, a white picture.
        levels = _eight_bits(np.asarray(image), scaled_to_16_bits)
        return 255 - levels if white_is_zero else levels
    if image.mode == "La":  # premultiplied grey converts to nothing else
        image = image.convert("LA")
    # The copy gives torch an array it may own: PIL's buffer is read-only.
    return np.array(image.convert("RGB"))


def _eight_bits(values: np.ndarray[Any, Any], sixteen_bits: bool) -> np.ndarray[Any, Any]:
    """Scale grey values of 16 bits or more, or floating ones, to 0..255; wider ones by the range that they need."""
    if values.dtype == np.int32 and values.size and values.min() < 0:
        values = values.view(np.uint32)  # Pillow keeps unsigned 32-bit files in signed integers
    levels: np.ndarray[Any, Any] = np.nan_to_num(values.astype(np.float64))
    greatest = levels.max(initial=0.0)
    if sixteen_bits or 255 < greatest <= 65535:
        levels = levels / 257
    elif greatest > 65535:
        levels = levels / 16843009
    elif greatest <= 1 and values.dtype.kind == "f":
        levels = levels * 255
    bytes_: np.ndarray[Any, Any] = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return bytes_


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
        sizes = torch.tensor([image.shape[-2:] for image in images], dtype=torch.int64, device="cpu").reshape(-1, 2)
        return self.normalise(torch.stack(resized).to(torch.float32)), sizes

    def normalise(self, images: Tensor) -> Tensor:
        """Scale and normalise a batch; differentiable and exportable.

        Args:
            images: (B, 3, H, W), floating, values 0..255.

        Returns:
            (B, 3, H, W), the same dtype, as the network takes it.
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
