"""Images cut into tiles: what is found in them, whatever the batches, and however often the run is killed."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from detpost import DecodeSpec, DetectionPostProcessor, Detector
from detpost.command.cli import app
from detpost.fusion import merge
from detpost.heads import to_rle
from detpost.heads.found import Found
from detpost.heads.masks import mask_of_rle
from detpost.images import FixedSize, Preprocessing, TensorRows, read_image
from detpost.runs.detect import detect
from detpost.runs.memory import Memory
from detpost.runs.reading import Reader
from detpost.runs.tiles import INPUTS_AT_ONCE, Tiling, cut, detect_tiles
from detpost.zoo import SAMPLES
from tests.runs.raw_outputs import given_detector, make_noise
from tests.runs.test_detect import files_of, journal_rows, make_images

ROOT = Path(__file__).parents[2]
METHODS = {"nms": {"metric": "ios"}, "nmm": {"metric": "ios"}, "wbf": {"threshold": 0.55}}


@pytest.fixture(scope="module")
def tiny():
    return Detector.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Compose 4000 x 3000 pixels with the digits of the samples, 40 to 160 pixels high; boxes (N, 4), labels (N,)."""
    truth = json.loads((SAMPLES / "ground_truth.json").read_text())
    canvas = Image.new("RGB", (4000, 3000), (150, 140, 120))
    boxes, labels = [], []
    for number in range(8):
        image = truth["images"][number % 4]
        left, top = 90 + 970 * (number % 4), 250 + 1400 * (number // 4) + 60 * (number % 3)
        with Image.open(SAMPLES / image["file_name"]) as sample:
            canvas.paste(sample.convert("RGB").resize((2 * sample.width, 2 * sample.height)), (left, top))
        for row in truth["annotations"]:
            if row["image_id"] == image["id"]:
                x, y, width, height = (2 * side for side in row["bbox"])
                boxes.append([left + x, top + y, left + x + width, top + y + height])
                labels.append(row["category_id"])
    path = tmp_path_factory.mktemp("scene") / "scene.jpg"
    canvas.save(path, quality=92)
    return path, np.array(boxes), np.array(labels)


@pytest.fixture
def given(monkeypatch):
    detector = given_detector()
    monkeypatch.setattr(Detector, "load", lambda *_, **__: detector)
    return detector


class TestCut:
    @pytest.mark.parametrize(
        ("size", "overlap", "image", "across", "down"),
        [  # what sahi 0.12.8 gives
            (640, 0.2, (3000, 4000), [0, 512, 1024, 1536, 2048, 2560, 3072, 3360], [0, 512, 1024, 1536, 2048, 2360]),
            (640, 0.25, (640, 1500), [0, 480, 860], [0]),
            (640, 0.2, (700, 641), [0, 1], [0, 60]),
            (320, 0.5, (2000, 300), [0], [0, 160, 320, 480, 640, 800, 960, 1120, 1280, 1440, 1600, 1680]),
            (333, 0.13, (1000, 999), [0, 290, 580, 666], [0, 290, 580, 667]),
        ],
    )
    def test_tiles_lie_where_sahi_has_them(self, size, overlap, image, across, down):
        assert Tiling(size, overlap).corners(*image) == [(x, y) for y in down for x in across]

    def test_every_pixel_is_in_a_tile_and_neighbours_share_the_overlap(self):
        random = np.random.default_rng(0)
        for _ in range(200):
            size, overlap = int(random.integers(16, 90)), float(random.uniform(0, 0.9))
            extent = int(random.integers(size + 1, 500))
            starts = [x for x, _ in Tiling(size, overlap).corners(1, extent)]
            assert starts[0] == 0
            assert starts[-1] + size == extent
            shared = [one + size - other for one, other in itertools.pairwise(starts)]
            assert min(shared) >= int(size * overlap)
            assert all(n == int(size * overlap) for n in shared[:-1])

    def test_an_image_that_is_no_larger_is_not_cut(self):
        assert Tiling(64).corners(64, 64) == Tiling(64).corners(3, 5) == []
        assert len(Tiling(64).corners(65, 64)) == 2

    def test_tiles_are_prepared_as_images_of_their_own(self, tmp_path):
        image = read_image(make_noise(tmp_path) / "0.png")
        tiling, prepare = Tiling(32, 0.25), FixedSize(Preprocessing(20, 24))
        tiles = cut(TensorRows(image), tiling, prepare)
        assert [tile.corner for tile in tiles] == tiling.corners(90, 120)
        for (left, top), ready in tiles:
            alone = prepare.one(TensorRows(image[:, top : top + 32, left : left + 32].contiguous()))
            assert torch.equal(ready.pixels, alone.pixels)
            assert ready.size == alone.size == (32, 32)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"size": 15}, "tiles must be at least 16 pixels; got 15"),
            ({"size": 64, "overlap": 0.95}, r"overlap must lie within \[0, 0.9\]; got 0.95"),
            ({"size": 64, "merge": "soft"}, "merge must be one of nms, nmm, wbf; got 'soft'"),
        ],
    )
    def test_what_cannot_be_is_one_line(self, options, reason):
        with pytest.raises(ValueError, match=reason):
            Tiling(**options)


class TestFound:
    def test_small_digits_of_a_large_scene_are_found(self, tmp_path, scene):
        path, *truth = scene
        recall = {}
        for name, tiling in (("whole", None), *((method, Tiling(640, merge=method)) for method in METHODS)):
            detect([path], tmp_path / name, device="cpu", tiling=tiling, formats=("jsonl",))
            found = json.loads((tmp_path / name / "detections.jsonl").read_text())["detections"]
            recall[name] = _recall(*truth, found)
        assert recall["whole"] < 0.1
        assert all(recall[method] > 0.8 for method in METHODS), recall

    @pytest.mark.parametrize("method", METHODS)
    def test_it_is_the_merge_of_what_predict_finds_in_the_parts(self, tmp_path, tiny, method):
        tiling, path = Tiling(120, 0.3, method), SAMPLES / "lake.png"
        detect([path], tmp_path, device="cpu", tiling=tiling, formats=("jsonl",), batch_size=3)
        image = read_image(path)  # (3, 240, 320)
        corners = tiling.corners(*image.shape[1:])
        parts = [image[:, top : top + 120, left : left + 120] for left, top in corners]
        alone = tiny.predict([image, *parts], batch_size=3)
        expected = merge(alone, [(0, 0), *corners], method, confidence="max", **METHODS[method])
        found = json.loads((tmp_path / "detections.jsonl").read_text())["detections"]
        assert len(found) == len(expected["scores"]) > 4
        # What the whole image shows and a tile, too, is one detection.
        assert len(found) < sum(len(part["scores"]) for part in alone)
        assert [row["label"] for row in found] == expected["labels"].tolist()
        assert [row["label_name"] for row in found] == [str(row["label"]) for row in found]
        np.testing.assert_allclose([row["score"] for row in found], expected["scores"], rtol=1e-4)
        np.testing.assert_allclose([row["box"] for row in found], expected["boxes"], atol=1e-2)

    def test_pictures_show_the_whole_image(self, tmp_path, given):
        Image.new("RGB", (700, 650)).save(tmp_path / "flat.png")
        detect([tmp_path / "flat.png"], tmp_path, tiling=Tiling(300), draw=True)
        with Image.open(tmp_path / "pictures" / "flat.png") as picture:
            assert picture.size == (700, 650)


class TestRuns:
    @pytest.mark.parametrize("method", METHODS)
    def test_it_is_the_same_whatever_the_batch_size_and_the_workers(self, tmp_path, given, method):
        make_noise(tmp_path)
        results, batches = [], []
        for batch, workers in ((1, 1), (3, 2), (16, 4)):
            given.run.batches.clear()
            out = tmp_path / f"out{batch}"
            options = {"formats": ("coco", "jsonl", "csv"), "batch_size": batch, "workers": workers}
            detect([tmp_path / "*.png"], out, tiling=Tiling(64, 0.2, method), **options)
            results.append(files_of(out))
            batches.append(list(given.run.batches))
        assert results[0] == results[1] == results[2]
        assert len(results[0]["detections.csv"].splitlines()) > 100
        inputs = len(batches[0])
        assert inputs == sum(map(sum, batches[1:])) / 2 == 7 + 6 + 2 + 8 + 4 + 3
        assert batches[2] == [16, 14]  # tiles of several images together

    def test_tiles_that_wait_are_bounded(self, tmp_path):
        names = [f"{number:02}.png" for number in range(30)]
        for name in names:
            Image.fromarray(np.zeros((100, 100), np.uint8)).save(tmp_path / name)
        batch, workers, tiling = 1, 2, Tiling(40, 0)
        prepare = FixedSize(Preprocessing(8, 8))
        reader = Reader(tmp_path, prepare, batch, 10**6, workers, Memory(), None, tiling)
        read, done, most = [], 0, 0
        plain = reader.read
        reader.read = lambda name: read.append(name) or plain(name)
        for loaded in reader.batches(names):
            assert [len(one.tiles) for one in loaded] == [9]
            done += len(loaded)
            time.sleep(0.01)
            most = max(most, len(read) - done)
        assert len(read) == done == 30
        assert 0 < most <= 1 + workers + INPUTS_AT_ONCE * batch // 9 + 1

    def test_a_batch_of_images_ends_with_its_tiles(self, tmp_path, given):
        for number in range(9):
            Image.fromarray(np.zeros((100, 100), np.uint8)).save(tmp_path / f"{number}.png")
        detect([tmp_path / "*.png"], tmp_path / "out", tiling=Tiling(40, 0), batch_size=4)
        lines = (tmp_path / "out" / "detpost-journal.jsonl").read_text().splitlines()[1:]
        # 32 tiles are reached by the fourth image.
        assert [json.loads(line)["left"] for line in lines] == [3, 2, 1, 0, 3, 2, 1, 0, 0]
        assert given.run.batches == [4] * 10 + [4] * 10 + [4, 4, 2]

    def test_too_many_tiles_are_a_row_with_the_reason(self, tmp_path, given):
        Image.new("L", (9000, 300)).save(tmp_path / "wide.png")
        Image.new("L", (90, 90)).save(tmp_path / "fine.png")
        summary = detect([tmp_path / "*.png"], tmp_path / "out", tiling=Tiling(16, 0))
        reason = (
            "the detector cannot take 9000 x 300 pixels: 10697 tiles of 16 pixels are more than 1024: take larger ones"
        )
        assert summary.skipped == (("wide.png", reason),)

    def test_other_tiles_are_refused_in_one_line(self, tmp_path, given):
        make_noise(tmp_path)
        run = lambda out, tiling: detect([tmp_path / "*.png"], tmp_path / out, tiling=tiling)  # noqa: E731
        run("whole", None)
        run("cut", Tiling(64))
        with pytest.raises(
            ValueError, match=r"\(tiles none, not 64 overlap 0.2 nmm\): take another folder, or --fresh"
        ):
            run("whole", Tiling(64))
        with pytest.raises(ValueError, match=r"\(tiles 64 overlap 0.2 nmm, not none\)"):
            run("cut", None)
        for other in (Tiling(65), Tiling(64, 0.25), Tiling(64, merge="wbf")):
            with pytest.raises(ValueError, match=rf"\(tiles 64 overlap 0.2 nmm, not {other}\)"):
                run("cut", other)
        assert run("cut", Tiling(64)).resumed == 7

    def test_what_a_kill_leaves_of_the_journal_is_gone_on_from(self, tmp_path, given):
        images = make_noise(tmp_path) / "*.png"
        options = {"tiling": Tiling(64), "batch_size": 1, "formats": ("coco", "jsonl")}
        detect([images], tmp_path / "whole", **options)
        journal = (tmp_path / "whole" / "detpost-journal.jsonl").read_bytes()
        for number, kept in enumerate(range(0, len(journal), len(journal) // 7)):
            out = tmp_path / f"cut{number}"
            out.mkdir()
            (out / "detpost-journal.jsonl").write_bytes(journal[:kept])
            given.run.batches.clear()
            summary = detect([images], out, **options)
            assert (len(given.run.batches) < 30) == (summary.resumed > 0)
            assert files_of(out) == files_of(tmp_path / "whole")
            assert (out / "detpost-journal.jsonl").read_bytes() == journal

    @pytest.mark.slow
    def test_killed_and_resumed_it_gives_the_same_bytes(self, tmp_path):
        make_images(tmp_path / "in", 7)
        points = ["never:0", "write:1:100", "write:2:-1", "synced:1"]
        script = Path(__file__).with_name("killed_runs.py")
        run = subprocess.run(
            [sys.executable, script, tmp_path / "in", tmp_path / "out", "tiles:96", *points],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        told = {row["point"]: row for row in map(json.loads, run.stdout.splitlines())}
        expected = tmp_path / "out" / "never_0"
        assert len(journal_rows(expected)) == 8
        assert told["never:0"]["through"] > 40  # tiles
        assert len(json.loads((expected / "detections.json").read_text())) > 10
        for point in points[1:]:
            assert (told[point]["died"], told[point]["again"]) == (-signal.SIGKILL, 0), run.stderr
            folder = tmp_path / "out" / point.replace(":", "_")
            assert files_of(folder) == files_of(expected), point
            assert journal_rows(folder) == journal_rows(expected), point
        assert told["write:1:100"]["resumed"] == 0
        assert 0 < told["write:2:-1"]["resumed"] == told["synced:1"]["resumed"] < 8


class TestCommand:
    def test_the_options_are_those_of_the_run(self, tmp_path, given):
        make_noise(tmp_path)
        source = str(tmp_path / "*.png")
        options = ["--tiles", "64", "--overlap", "0.3", "--merge", "wbf", "--batch", "4"]
        result = CliRunner().invoke(app, ["detect", source, "--out", str(tmp_path / "a"), *options])
        assert result.exit_code == 0, result.output
        detect([source], tmp_path / "b", tiling=Tiling(64, 0.3, "wbf"), batch_size=4)
        assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
        header = json.loads((tmp_path / "a" / "detpost-journal.jsonl").read_text().splitlines()[0])
        assert header["settings"]["tiles"] == "64 overlap 0.3 wbf"

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (["--overlap", "0.3"], "--overlap goes with --tiles: say how large a tile is, as --tiles 640"),
            (["--merge", "nms"], "--merge goes with --tiles"),
            (["--tiles", "64", "--merge", "soft"], "merge must be one of nms, nmm, wbf; got 'soft'"),
        ],
    )
    def test_what_does_not_go_together_is_one_line(self, tmp_path, options, reason):
        result = CliRunner().invoke(app, ["detect", str(SAMPLES), "--out", str(tmp_path / "out"), *options])
        assert isinstance(result.exception, ValueError)
        assert reason in str(result.exception)
        assert not (tmp_path / "out").exists()


class TestBeside:
    """Detectors that give more than boxes."""

    @staticmethod
    def detector(**beside):
        def find(images, sizes, pixel_mask):
            bright = (images.mean(dim=(1, 2, 3)) > 0).float()[:, None]  # (B, 1)
            heights, widths = sizes.unbind(1)
            nothing = torch.zeros_like(heights)
            boxes = torch.stack((nothing, nothing, widths, heights), dim=1).float()[:, None]
            post = DetectionPostProcessor(DecodeSpec(top_k=1))
            found = post(8 * bright[..., None] - 4, torch.tensor([0.5, 0.5, 1, 1]).expand(len(images), 1, 4), sizes)
            found = found._replace(boxes=boxes)
            given = {name: values.expand(len(images), *values.shape) for name, values in beside.items()}
            masks = None if beside else images.mean(dim=1, keepdim=True) - 0.5
            return Found(found, masks, beside=given)

        prepare = FixedSize(Preprocessing(32, 32))
        run = lambda *inputs: find(*inputs).detections  # noqa: E731
        return Detector(run, prepare, {0: "bright"}, torch.device("cpu"), 0.5, find=find)

    @staticmethod
    def found(detector, method):
        image = torch.zeros(3, 64, 96, dtype=torch.uint8)
        image[:, 40:56, 72:88] = 255
        tiling = Tiling(32, 0, method)
        tiles = cut(TensorRows(image), tiling, detector.prepare)
        # The whole image shows it as well: its box swallows those of tiles.
        whole = detector.prepare.one(TensorRows(torch.zeros_like(image)))
        return detect_tiles(detector, [(whole, tiles)], tiling, 4)[0], image

    def test_masks_come_in_pixels_of_the_image(self):
        found, image = self.found(self.detector(), "nms")
        assert found["boxes"].tolist() == [[64, 32, 96, 64]]
        (rle,) = found["segmentations"]
        assert rle == {**to_rle(image[:1] > 0)[0], "counts": to_rle(image[:1] > 0)[0]["counts"].decode()}
        np.testing.assert_array_equal(mask_of_rle(rle["counts"], rle["size"]), image[0].numpy() > 0)

    def test_keypoints_and_oriented_boxes_move_with_their_tile(self):
        beside = {
            "keypoints": torch.tensor([[[1.0, 2.0, 0.5], [3.0, 4.0, 0.25]]]),
            "keypoint_scores": torch.tensor([0.75]),
            "oriented_boxes": torch.tensor([[5.0, 6.0, 7.0, 8.0, 0.125]]),
        }
        found, _ = self.found(self.detector(**beside), "nms")
        assert found["keypoints"] == [[[65, 34, 0.5], [67, 36, 0.25]]]
        assert found["keypoint_scores"] == [0.75]
        assert found["oriented_boxes"] == [[69, 38, 7, 8, 0.125]]

    @pytest.mark.parametrize("method", ["nmm", "wbf"])
    def test_a_merge_that_makes_new_boxes_is_refused(self, method):
        with pytest.raises(
            ValueError, match=f"{method} makes new boxes and cannot make segmentations for them: merge by nms"
        ):
            self.found(self.detector(), method)


def _recall(boxes, labels, found):
    """Give the share of digits that a detection of theirs lies on, with an IoU of half and more."""
    hits = set()
    for row in found:
        box = np.array(row["box"])
        low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
        inner = np.clip(high - low, 0, None).prod(axis=1)
        outer = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - inner
        hits |= set(np.flatnonzero((inner / outer >= 0.5) & (labels == row["label"])).tolist())
    return len(hits) / len(labels)
