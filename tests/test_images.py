"""Images come out right whatever they are."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from detpost.images import Preprocessing, TensorRows, opened, read_image, resize

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


@pytest.mark.parametrize(
    "kind", ["I;16", "I;16B", "I;16 tiff", "I;16B tiff", "I ppm", "I;16 jp2", "white is zero tiff"]
)
@pytest.mark.parametrize("top", [255, 3], ids=["bright", "dark"])
def test_every_sixteen_bit_image_is_divided_by_257(tmp_path, kind, top):
    tifffile = pytest.importorskip("tifffile")
    grey = (GRADIENT[:, :, 0] // (255 // top)).astype(np.uint8)
    deep = grey.astype(np.uint16) * 257
    if kind.endswith("tiff"):
        zero = "miniswhite" if kind.startswith("white") else "minisblack"
        tifffile.imwrite(tmp_path / "x.tif", deep, byteorder=">" if "B" in kind else "<", photometric=zero)
        source = tmp_path / "x.tif"
    elif " " in kind:
        source = tmp_path / f"x.{kind.split()[1]}"
        Image.fromarray(deep).save(source)
    else:
        source = Image.fromarray(deep.astype(">u2" if kind.endswith("B") else "<u2"))
    expected = 255 - grey if kind.startswith("white") else grey
    assert torch.equal(read_image(source), torch.from_numpy(expected).expand(3, 6, 8))


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("uint32", GRADIENT[:, :, 0].astype(np.uint32) * 16843009),
        ("float 0..1", GRADIENT[:, :, 0].astype(np.float32) / 255),
        ("float 0..255", GRADIENT[:, :, 0].astype(np.float32)),
        ("int32 0..255", GRADIENT[:, :, 0].astype(np.int32)),
        ("float 0..65535", GRADIENT[:, :, 0].astype(np.float32) * 257),
    ],
)
def test_other_deep_images_are_scaled_by_the_range_they_need(tmp_path, mode, values):
    pytest.importorskip("tifffile").imwrite(tmp_path / "x.tif", values, photometric="minisblack")
    assert torch.equal(read_image(tmp_path / "x.tif"), torch.from_numpy(GRADIENT[:, :, 0]).expand(3, 6, 8))


@pytest.mark.parametrize(
    "mode",
    [
        *("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"),
        *("LA", "PA", "RGBX", "RGBa", "La", "I;16", "I;16L", "I;16B", "I;16N"),
    ],
)
def test_every_mode_of_pillow_gives_three_planes(mode):
    assert read_image(Image.new(mode, (5, 4))).shape == (3, 4, 5)


def test_cmyk_alpha_and_transparent_palettes_keep_their_colours(tmp_path):
    red = np.zeros((6, 8, 3), np.uint8) + np.array([250, 10, 20], np.uint8)
    Image.fromarray(red).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    assert Image.open(tmp_path / "x.jpg").mode == "CMYK"
    assert (read_image(tmp_path / "x.jpg").int() - as_tensor(red).int()).abs().max() <= 3
    palette = Image.fromarray(red).quantize(4)
    palette.save(tmp_path / "x.png", transparency=0)
    assert torch.equal(read_image(tmp_path / "x.png"), as_tensor(red))
    Image.fromarray(red[:, :, 0]).convert("LA").save(tmp_path / "la.png")
    assert torch.equal(read_image(tmp_path / "la.png"), torch.full((3, 6, 8), 250, dtype=torch.uint8))


def test_of_an_animation_it_is_the_first_frame(tmp_path):
    frames = [Image.fromarray(np.full((6, 8), value, np.uint8)) for value in (10, 200)]
    for name in ("x.gif", "x.webp", "x.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert (read_image(tmp_path / name).int() - 10).abs().max() <= 2, name


def test_exif_orientation_is_applied_to_sixteen_bits_too(tmp_path):
    deep = Image.fromarray(GRADIENT[:, :, 0].astype(np.uint16) * 257)
    exif = deep.getexif()
    exif[0x0112] = 6
    deep.save(tmp_path / "x.png", exif=exif)
    turned = torch.from_numpy(np.rot90(GRADIENT[:, :, 0], -1).copy())
    assert torch.equal(read_image(tmp_path / "x.png"), turned.expand(3, 8, 6))


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("empty.png", lambda png: b"", "cannot read image '.*empty.png': the file is empty"),
        ("text.png", lambda png: b"words", "text.png': not an image of a known format"),
        ("half.png", lambda png: png[: len(png) // 2], "cannot read image '.*half.png': "),
        ("noise.png", lambda png: png[:50] + b"\0" * 60, "cannot read image '.*noise.png': "),
    ],
)
def test_a_broken_file_is_an_os_error_of_one_line(tmp_path, name, content, pattern):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(buffer, "PNG")
    (tmp_path / name).write_bytes(content(buffer.getvalue()))
    with pytest.raises(OSError, match=pattern) as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_an_image_beyond_the_limit_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("L", (50, 40)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", max_pixels=2000).shape == (3, 40, 50)
    with pytest.raises(OSError, match=r"x\.png': 50 x 40 pixels are more than 1999"):
        read_image(tmp_path / "x.png", max_pixels=1999)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow's own error is not even an OSError
    with pytest.raises(OSError, match=r"cannot read image '.*x\.png': Image size \(2000 pixels\)"):
        read_image(tmp_path / "x.png")


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


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"std": (0.0, 0.0, 0.0)}, r"std must hold finite numbers above 0; got \(0.0, 0.0, 0.0\)"),
        ({"std": (1.0, -1.0, 1.0)}, "std must hold finite numbers above 0"),
        ({"std": (1.0, math.nan, 1.0)}, "std must hold finite numbers above 0"),
        ({"mean": (0.0, math.inf, 0.0)}, "mean must hold finite numbers"),
    ],
)
def test_what_no_pixel_could_be_normalised_with_is_refused(fields, pattern):
    with pytest.raises(ValueError, match=pattern):
        Preprocessing(4, 10, **fields)


def test_preprocessing_gives_the_size_of_each_original():
    batch, sizes = Preprocessing(4, 10, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))(
        [torch.full((3, 6, 8), 255, dtype=torch.uint8), torch.zeros(3, 20, 5, dtype=torch.uint8)]
    )
    assert batch.shape == (2, 3, 4, 10)
    assert sizes.tolist() == [[6, 8], [20, 5]]
    assert torch.allclose(batch[:, :, 0, 0], torch.tensor([[1.0, 2.0, 0.5], [-1.0, -2.0, -0.5]]))


STRIP_MODES = ("1", "L", "P", "RGB", "RGBA", "I;16", "CMYK", "LA")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", STRIP_MODES)
def test_strips_are_the_whole_image_whatever_its_mode_and_orientation(tmp_path, monkeypatch, mode, orientation):
    values = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    image = Image.fromarray(values)
    image = Image.fromarray(values[:, :, 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    assert image.mode == mode
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path, exif=exif)
    height, width = (53, 37) if orientation > 4 else (37, 53)
    whole = read_image(path)
    assert whole.shape == (3, height, width)
    with Image.open(path) as seen:
        upright = ImageOps.exif_transpose(seen)
        if mode != "I;16":
            assert torch.equal(whole, as_tensor(np.array(upright.convert("RGB"))))
    resized = TensorRows(whole)
    expected = resize(resized, 20, 24)
    with opened(path) as rows:
        for step in (1, 7, height):
            strips = [rows.rows(top, min(top + step, height)) for top in range(0, height, step)]
            assert torch.equal(torch.cat(strips, dim=1), whole), step
    monkeypatch.setattr("detpost.images.STRIP_PIXELS", 5 * width)  # seven strips and more
    monkeypatch.setattr("detpost.images.FileRows.strip", 5 * width)
    monkeypatch.setattr("detpost.image_files.PIECE_PIXELS", 2 * width)  # of three pieces each
    with opened(path) as rows:
        assert torch.equal(rows.rows(0, height), whole)
        assert torch.equal(resize(rows, 20, 24), expected)
