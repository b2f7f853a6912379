"""Images come out right whatever they are."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from detpost.images import Preprocessing, read_image

GRADIENT = np.linspace(0, 255, 6 * 8 * 3).astype(np.uint8).reshape(6, 8, 3)


def as_tensor(array):
    return torch.from_numpy(array).permute(2, 0, 1)


@pytest.mark.parametrize("how", ["path", "str", "pil", "array", "uint8 tensor", "float tensor"])
def test_every_kind_of_source_gives_the_same_pixels(tmp_path, how):
    Image.fromarray(GRADIENT).save(tmp_path / "image.png")
    source = {
        "path": tmp_path / "image.png",
        "str": str(tmp_path / "image.png"),
        "pil": Image.fromarray(GRADIENT),
        "array": GRADIENT,
        "uint8 tensor": as_tensor(GRADIENT),
        "float tensor": as_tensor(GRADIENT) / 255,
    }[how]
    assert torch.equal(read_image(source), as_tensor(GRADIENT))


def test_grey_palette_alpha_and_one_bit_images_become_rgb():
    grey = Image.fromarray(GRADIENT[:, :, 0])
    assert torch.equal(read_image(grey), torch.from_numpy(GRADIENT[:, :, 0]).expand(3, 6, 8))
    palette = Image.fromarray(GRADIENT).quantize(256)
    assert torch.equal(read_image(palette), as_tensor(np.array(palette.convert("RGB"))))
    opaque = Image.fromarray(GRADIENT).convert("RGBA")
    assert torch.equal(read_image(opaque), as_tensor(GRADIENT))
    assert torch.equal(read_image(np.array(opaque)), as_tensor(GRADIENT))
    assert read_image(Image.new("1", (4, 3), 1)).unique().tolist() == [255]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = (GRADIENT[:, :, 0].astype(np.uint16)) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert torch.equal(read_image(tmp_path / "deep.png"), torch.from_numpy(GRADIENT[:, :, 0]).expand(3, 6, 8))


def test_exif_orientation_is_applied():
    image = Image.fromarray(GRADIENT)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise to see it right
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    turned = read_image(Image.open(io.BytesIO(buffer.getvalue())))
    assert torch.equal(turned, as_tensor(np.rot90(GRADIENT, -1).copy()))


@pytest.mark.parametrize(
    ("source", "error", "pattern"),
    [
        (GRADIENT.astype(np.float32), TypeError, "uint8; got float32"),
        (GRADIENT[None], ValueError, r"got \(1, 6, 8, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"got \(0, 4, 3\)"),
        (torch.zeros(5, 4, 4), ValueError, r"got \(5, 4, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, "int64"),
        (7, TypeError, "got int"),
    ],
)
def test_what_is_not_an_image_is_one_line(source, error, pattern):
    with pytest.raises(error, match=pattern) as caught:
        read_image(source)
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_an_os_error(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    for name in ("missing.png", "broken.png"):
        with pytest.raises(OSError, match=name):
            read_image(tmp_path / name)


def test_the_source_is_not_shared_with_the_result():
    source = GRADIENT.copy()
    image = read_image(source)
    before = image.clone()
    source[:] = 0
    assert torch.equal(image, before)


def test_preprocessing_gives_the_size_of_each_original():
    batch, sizes = Preprocessing(4, 10, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))(
        [torch.full((3, 6, 8), 255, dtype=torch.uint8), torch.zeros(3, 20, 5, dtype=torch.uint8)]
    )
    assert batch.shape == (2, 3, 4, 10)
    assert sizes.tolist() == [[6, 8], [20, 5]]
    assert torch.allclose(batch[:, :, 0, 0], torch.tensor([[1.0, 2.0, 0.5], [-1.0, -2.0, -0.5]]))
