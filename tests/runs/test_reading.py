"""Reading ahead: at a reduced scale where that was asked for, and what the network waited for."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from detpost import Detector
from detpost.command import show
from detpost.command.cli import app
from detpost.image_files import blocks_kept
from detpost.images import FixedSize, Preprocessing
from detpost.runs.detect import detect
from detpost.runs.journal import Journal
from detpost.runs.memory import Memory
from detpost.runs.reading import Reader
from detpost.runs.tiles import Tiling
from detpost.zoo import sample_images
from tests.runs.raw_outputs import Maker, Prepare, give

CORE = Image.core


@pytest.fixture(scope="module")
def photograph():
    """Give an image with detail of several sizes, 1200 x 900."""
    random, pixels = np.random.default_rng(0), np.zeros((900, 1200, 3), np.float32)
    for cells in (5, 20, 80, 300):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        pixels += np.asarray(coarse.resize((1200, 900), Image.Resampling.BICUBIC), np.float32) / 4
    return Image.fromarray(pixels.astype(np.uint8))


def read(path, height, width, draft, max_pixels=10**8):
    prepare = FixedSize(Preprocessing(height, width))
    return Reader(path.parent, prepare, 1, max_pixels, 1, Memory(), None, draft=draft).read(path.name)


class TestDraft:
    @pytest.mark.parametrize("orientation", [1, 6])
    def test_a_jpeg_file_far_larger_than_the_input_is_decoded_smaller_and_differs_by_little(
        self, tmp_path, photograph, monkeypatch, orientation
    ):
        exif = Image.Exif()
        exif[274] = orientation
        photograph.save(tmp_path / "large.jpg", quality=90, exif=exif)
        whole = read(tmp_path / "large.jpg", 128, 160, draft=False)
        sizes = []
        load = Image.Image.load
        monkeypatch.setattr(Image.Image, "load", lambda image: (sizes.append(image.size), load(image))[1])
        reduced = read(tmp_path / "large.jpg", 128, 160, draft=True)
        assert sizes[0] == (600, 450)  # a quarter would be less than twice the input
        assert reduced.ready.size == whole.ready.size == ((900, 1200) if orientation == 1 else (1200, 900))
        difference = (reduced.ready.pixels.float() - whole.ready.pixels.float()).abs()
        assert 0 < difference.mean() < 0.5
        assert difference.max() <= 8

    @pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
    def test_other_formats_and_images_that_are_not_far_larger_are_read_as_they_are(self, tmp_path, photograph, ending):
        path = tmp_path / f"image.{ending}"
        photograph.save(path)
        size = (128, 160) if ending != "jpg" else (640, 640)
        assert torch.equal(read(path, *size, draft=True).ready.pixels, read(path, *size, draft=False).ready.pixels)

    def test_the_limit_on_pixels_is_of_the_whole_image(self, tmp_path, photograph):
        photograph.save(tmp_path / "large.jpg")
        loaded = read(tmp_path / "large.jpg", 64, 64, draft=True, max_pixels=1_000_000)
        assert loaded.error == "1200 x 900 pixels are more than 1000000"

    def test_boxes_are_in_pixels_of_the_whole_image(self, tmp_path):
        for number, path in enumerate(sample_images()):
            picture = Image.open(path).convert("RGB")
            picture.resize((picture.width * 8, picture.height * 8), Image.Resampling.BICUBIC).save(
                tmp_path / f"{number}.jpg", quality=95
            )
        options = {"device": "cpu", "formats": ("jsonl",), "threshold": 0.3}
        detect([tmp_path], tmp_path / "whole", **options)
        detect([tmp_path], tmp_path / "reduced", draft=True, **options)
        whole, reduced = (detections(tmp_path / name) for name in ("whole", "reduced"))
        sure = [found for found in whole if found["score"] > 0.8]
        assert len(sure) > 12
        for found in sure:  # within half a pixel of the sample, 4 of this one
            beside = [other for other in reduced if np.allclose(other["box"], found["box"], rtol=0, atol=4)]
            assert any(abs(other["score"] - found["score"]) < 0.02 for other in beside if same(found, other))

    def test_it_goes_with_nothing_that_needs_the_whole_image_and_is_a_setting_of_the_run(self, tmp_path):
        images = [sample_images()[0]]
        for options, other in (({"draw": True}, "draw"), ({"tiling": Tiling(64)}, "tiles")):
            with pytest.raises(ValueError, match=f"draft reads images at a reduced scale: leave out it or {other}"):
                detect(images, tmp_path, draft=True, **options)
        detect(images, tmp_path, device="cpu")
        with pytest.raises(ValueError, match=r"other settings \(decoding none, not draft\)"):
            detect(images, tmp_path, device="cpu", draft=True)


def detections(folder):
    lines = (folder / "detections.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return [{**found, "file_name": row["file_name"]} for row in rows for found in row["detections"]]


def same(one, other):
    return (one["file_name"], one["label"]) == (other["file_name"], other["label"])


class TestWaits:
    @pytest.mark.parametrize("slow", ["reading", "network", "writing"])
    def test_the_run_says_which_stage_it_waited_for(self, tmp_path, monkeypatch, slow):
        def slowed(call):
            def slower(*arguments, **options):
                time.sleep(0.2)
                return call(*arguments, **options)

            return slower

        where = {
            "reading": (Prepare, "one"),
            "network": (Detector, "predict_ready"),
            "writing": (Journal, "append"),
        }[slow]
        monkeypatch.setattr(*where, slowed(getattr(*where)))
        said = []
        images = give(tmp_path, 6)
        monkeypatch.setattr(Detector, "load", lambda *_, **__: Maker(tmp_path)())
        options = {"batch_size": 1, "workers": 1, "stages": said.append}
        summary = detect([images], tmp_path / "out", **options)
        assert max(summary.seconds, key=summary.seconds.get) == slow
        assert summary.seconds[slow] > 0.8
        assert said[0] == dict.fromkeys(("reading", "network", "writing"), 0.0)
        assert said[-1] == summary.seconds

    def test_the_progress_names_it(self, tmp_path):
        assert (
            show.waits({"reading": 3.0, "network": 6.7, "writing": 0.3}) == "network waits 30% of the time for reading"
        )
        assert show.waits({"reading": 0.1, "network": 9.9, "writing": 0.0}) == show.waits({}) == ""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(show, "waits", lambda seconds: f"noted {sorted(seconds)}")
            result = CliRunner().invoke(app, ["detect", str(sample_images()[0]), "--out", str(tmp_path)])
        assert "1 of 1 images" in result.output
        assert "noted ['network', 'reading', 'writing']" in result.output


def test_pillows_own_settings_are_as_before_after_a_run():
    before = CORE.get_blocks_max()
    with blocks_kept():
        assert CORE.get_blocks_max() >= 8
        with pytest.raises(KeyError), blocks_kept():
            raise KeyError
        assert CORE.get_blocks_max() >= 8
    assert CORE.get_blocks_max() == before
