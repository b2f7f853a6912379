"""Image files: opened under a limit of our own, upright and RGB whatever they hold, a strip of rows at a time."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageFile

__all__ = ["UprightImage", "blocks_kept", "decoding_bytes", "open_image", "reduce_decoding"]

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# Images are worked on in strips of about so many pixels: wider copies of one, as RGB or in floats, stay small.
STRIP_PIXELS = 2**22
# What Pillow copies of an image comes in pieces of about so many: they stay in the processor's cache, and in memory
# that the process has already, where a large one's comes from the system anew, page by page, each time.
PIECE_PIXELS = 2**18

_BLOCKS_KEPT = 8

_ORIENTATION = 274
_TIFF_PHOTOMETRIC = 262
_TIFF_COMPRESSION = 259

# What Pillow keeps of a pixel, by mode; 4 bytes where the mode is not here.
_MODE_BYTES = {"1": 1, "L": 1, "P": 1}
# What the decoders of some formats need beside that at their worst, in bytes a pixel, measured: frames of an animation
# and their copy, samples as 32-bit integers, all coefficients of a progressive JPEG, a TIFF that is one strip.
_DECODER_BYTES = {"WEBP": 12, "JPEG2000": 16, "AVIF": 6, "TIFF": 4}
_PROGRESSIVE_BYTES = 6


@contextlib.contextmanager
def open_image(
    path: str | Path, max_pixels: int | None = None, content: bytes | None = None
) -> Iterator[ImageFile.ImageFile]:
    """Open a file and read its header; the pixels are decoded by :class:`UprightImage`, within this context.

    Args:
        path: the file.
        max_pixels: most pixels that the header may say. The limit is ours: Pillow's own, ``MAX_IMAGE_PIXELS``, belongs
            to the whole process and is neither changed nor asked, though a few formats (WebP) ask it themselves.
            ``None`` leaves it to Pillow's.
        content: what the file holds, where that is in memory already; ``path`` is its name then.

    Yields:
        Pillow's image, not decoded yet.

    Raises:
        OSError: a file that is missing, too large or cannot be read as an image, in one line that names it; whatever a
            decoder raises within the context is turned into one.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if max_pixels is None:
            with Image.open(path if content is None else io.BytesIO(content)) as image:
                yield image
        else:
            with _binary(path, content) as file, _identified(file, str(path)) as image:
                if image.width * image.height > max_pixels:
                    raise OSError(f"{image.width} x {image.height} pixels are more than {max_pixels}")
                yield image
        return
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except UnidentifiedImageError:
        size = Path(path).stat().st_size if content is None else len(content)
        reason = "not an image of a known format" if size else "the file is empty"
    except MemoryError:
        reason = "not enough memory for its pixels"
    # On broken files Pillow's decoders raise SyntaxError, struct.error, zlib.error, EOFError, KeyError and more.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    raise OSError(f"cannot read image {str(path)!r}: {reason}")


def _binary(path: str | Path, content: bytes | None) -> Any:
    return Path(path).open("rb") if content is None else io.BytesIO(content)


def _identified(file: Any, name: str) -> ImageFile.ImageFile:
    """Do what ``Image.open`` does, but for its look at the process's limit on pixels."""
    from PIL import Image, UnidentifiedImageError

    prefix = file.read(16)
    for load in (Image.preinit, Image.init):  # the common formats, then all of them
        load()
        for kind in tuple(Image.ID):
            factory, accept = Image.OPEN[kind]
            try:
                accepted = accept is None or accept(prefix)
                if accepted and not isinstance(accepted, str):  # text says why not
                    file.seek(0)
                    return factory(file, name)
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue
    raise UnidentifiedImageError(name)


def decoding_bytes(image: Image.Image) -> int:
    """Tell from the header how much memory decoding takes.

    Args:
        image: of :func:`open_image`.

    Returns:
        Bytes, what the format's own decoder needs included.
    """
    each = 2 if image.mode.startswith("I;16") else _MODE_BYTES.get(image.mode, 4)
    extra = _DECODER_BYTES.get(image.format or "", 0)
    if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_TIFF_COMPRESSION, 1) == 1:
        extra = 0
    if image.info.get("progressive"):
        extra = _PROGRESSIVE_BYTES
    return image.width * image.height * (each + extra)


def reduce_decoding(image: ImageFile.ImageFile, height: int, width: int) -> tuple[int, int] | None:
    """Have a JPEG file decoded at a half, a quarter or an eighth of its size, where that is still at least so large.

    Args:
        image: of :func:`open_image`, not decoded yet.
        height: least, pixels, upright.
        width: least, pixels, upright.

    Returns:
        The (height, width) of the whole image, upright; ``None`` of another format, which is left as it is.
    """
    if image.format not in ("JPEG", "MPO"):
        return None
    across = _is_across(_turn_of(image))
    whole = image.size if across else image.size[::-1]
    image.draft(image.mode, (height, width) if across else (width, height))
    return whole


@contextlib.contextmanager
def blocks_kept() -> Iterator[None]:
    """Have Pillow keep some of the memory of images that are gone for the next ones, and give it back in the end.

    Pillow holds a large image in blocks of 16 MiB, and has each from the system anew, page by page: on JPEG files of 12
    megapixels a third of the time that decoding takes.
    """
    from PIL import Image

    core: Any = Image.core  # type: ignore[attr-defined]
    before = core.get_blocks_max()
    core.set_blocks_max(max(before, _BLOCKS_KEPT))
    try:
        yield
    finally:
        core.set_blocks_max(before)


class UprightImage:
    """A decoded image as its viewer sees it: EXIF orientation applied, RGB, 8 bits.

    The image stays as the file has it, one byte a pixel where that is black and white, grey or a palette; what is asked
    for is cropped, turned and converted on the way out.

    Args:
        image: Pillow's image of any mode; it is decoded here.

    Attributes:
        height: pixels, upright.
        width: pixels, upright.
    """

    def __init__(self, image: Image.Image) -> None:
        image.load()
        self._image = image
        self._turn = _turn_of(image)
        across = _is_across(self._turn)
        self.height, self.width = (image.width, image.height) if across else (image.height, image.width)
        self._across = across
        self._levels = _Levels(image) if _is_deep(image) else None

    def rows(self, top: int, bottom: int) -> Pixels:
        """Give the pixels of some rows.

        Args:
            top: the first row.
            bottom: the row after the last one.

        Returns:
            (bottom - top, width, 3), uint8, an array of its own.
        """
        step = max(1, PIECE_PIXELS // self.width)
        if bottom - top <= step:
            return self._piece(top, bottom)
        return np.concatenate([self._piece(first, min(first + step, bottom)) for first in range(top, bottom, step)])

    def _piece(self, top: int, bottom: int) -> Pixels:
        part = self._image
        if (top, bottom) != (0, self.height):
            part = part.crop(self._box(top, bottom))
        if self._turn is not None:
            part = part.transpose(self._turn)
        if self._levels is not None:
            return np.repeat(self._levels(np.asarray(part))[:, :, None], 3, 2)
        if part.mode == "La":  # premultiplied grey converts to nothing else
            part = part.convert("LA")
        # The copy gives torch an array it may own: PIL's buffer is read-only.
        return np.array(part.convert("RGB"))

    def _box(self, top: int, bottom: int) -> tuple[int, int, int, int]:
        """Find where these rows lie in the image as it is stored."""
        width, height = self._image.size
        first, last = top, bottom
        if self._turn is not None and self._turn.name in ("ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSVERSE", "ROTATE_90"):
            first, last = self.height - bottom, self.height - top
        return (first, 0, last, height) if self._across else (0, first, width, last)


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """Give what undoes the EXIF orientation."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return turns.get(image.getexif().get(_ORIENTATION, 1))


def _is_across(turn: Image.Transpose | None) -> bool:
    """Tell whether rows become columns."""
    return turn is not None and turn.name in ("TRANSPOSE", "TRANSVERSE", "ROTATE_90", "ROTATE_270")


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


class _Levels:
    """Grey values of 16 bits or more, or floating ones, to 0..255; wider ones by the range that the image needs.

    Pillow's own conversion would clip them to 255, a white picture.
    """

    def __init__(self, image: Image.Image) -> None:
        self._inverted = getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == 0  # Pillow inverts 8 bits alone
        bands = [np.asarray(band) for band in _bands(image)]
        # Pillow keeps unsigned 32-bit files in signed integers.
        self._unsigned = any(band.dtype == np.int32 and band.min() < 0 for band in bands)
        greatest = max(float(self._values(band).max()) for band in bands)
        self._divisor, self._factor = 1.0, 1.0
        if image.mode.startswith("I;16") or image.format in ("PNG", "PPM") or 255 < greatest <= 65535:
            self._divisor = 257.0
        elif greatest > 65535:
            self._divisor = 16843009.0
        elif greatest <= 1 and bands[0].dtype.kind == "f":
            self._factor = 255.0

    def _values(self, part: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
        values = part.view(np.uint32) if self._unsigned else part
        return np.nan_to_num(values.astype(np.float64))  # type: ignore[no-any-return]

    def __call__(self, part: np.ndarray[Any, Any]) -> Pixels:
        levels: Pixels = np.clip(np.rint(self._values(part) / self._divisor * self._factor), 0, 255).astype(np.uint8)
        return 255 - levels if self._inverted else levels


def _bands(image: Image.Image) -> Iterator[Image.Image]:
    if image.width * image.height <= STRIP_PIXELS:
        yield image
        return
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))
