"""Detection in folders: whatever lies in them, and however often the run is killed."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import detpost.runs.detect as subject
from detpost import Detector
from detpost.command.cli import app, main
from detpost.runs.detect import detect
from detpost.runs.settings import settings_of
from detpost.zoo import SAMPLES, sample_images

BROKEN = "b/broken image.jpg"


@pytest.fixture(scope="module")
def detector():
    return Detector.load("tiny", device="cpu")


@pytest.fixture
def quick(detector, monkeypatch):
    """Load the model once for all tests, and count the images that go through it."""
    seen = []
    predict = detector.predict_ready

    def counting(images, encode_masks=False):
        seen.append(len(images))
        return predict(images, encode_masks)

    def load(model, backend="eager", device=None, threshold=0.5, nms=None, **trusted):
        detector.threshold, detector.nms = threshold, nms
        return detector

    monkeypatch.setattr(detector, "predict_ready", counting)
    monkeypatch.setattr(Detector, "load", load)
    return seen


def make_images(folder, count=11):
    """Make views of the samples, in several folders and sizes, and one that is broken."""
    pictures = [Image.open(path).convert("RGB") for path in sample_images()]
    for number in range(count):
        picture = pictures[number % 4]
        place = folder / "abc"[number % 3] / f"{number % 5}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        while place.exists():
            place = place.with_name(f"x{place.name}")
        picture.crop((number, number // 2, picture.width - number, picture.height)).save(place)
    (folder / BROKEN).write_bytes(b"\xff\xd8\xff no more")
    return folder


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "detpost-journal.jsonl"
    }


def journal_rows(folder):
    lines = (folder / "detpost-journal.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "left"} for line in lines[1:]]


def invoke(*arguments):
    return CliRunner().invoke(app, ["detect", *map(str, arguments)])


class TestResults:
    def test_the_formats_hold_what_predict_gives(self, tmp_path, quick):
        summary = detect([SAMPLES], tmp_path, formats=("coco", "jsonl", "csv"), batch_size=3)
        expected = Detector.load("tiny", device="cpu").predict(sample_images(), batch_size=3)
        coco = json.loads((tmp_path / "detections.json").read_text())
        index = json.loads((tmp_path / "images.json").read_text())
        assert [(row["id"], row["file_name"]) for row in index["images"]] == [
            (number, path.name) for number, path in enumerate(sample_images(), start=1)
        ]
        assert {row["id"]: row["name"] for row in index["categories"]} == {digit: str(digit) for digit in range(10)}
        flat = [
            (number, label, name, score, *box)
            for number, image in enumerate(expected, start=1)
            for label, name, score, box in zip(
                image["labels"].tolist(),
                image["label_names"],
                image["scores"].tolist(),
                image["boxes"].tolist(),
                strict=True,
            )
        ]
        assert [(row["image_id"], row["category_id"], row["score"]) for row in coco] == [
            (number, label, score) for number, label, _, score, *_ in flat
        ]
        for row, (*_, x1, y1, x2, y2) in zip(coco, flat, strict=True):
            sides = (torch.tensor([x2, y2]) - torch.tensor([x1, y1])).tolist()
            assert row["bbox"] == [x1, y1, *sides]
        with (tmp_path / "detections.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        assert [
            (
                int(row["image_id"]),
                int(row["label"]),
                row["label_name"],
                *(float(row[k]) for k in ["score", "x1", "y1", "x2", "y2"]),
            )
            for row in table
        ] == flat
        lines = [json.loads(line) for line in (tmp_path / "detections.jsonl").read_text().splitlines()]
        assert [
            (line["image_id"], each["label"], each["label_name"], each["score"], *each["box"])
            for line in lines
            for each in line["detections"]
        ] == flat
        assert summary.detections == len(flat) > 10
        assert [(line["width"], line["height"]) for line in lines] == [Image.open(p).size for p in sample_images()]

    def test_ids_come_from_annotations(self, tmp_path, quick):
        truth = json.loads((SAMPLES / "ground_truth.json").read_text())
        for image in truth["images"]:
            image |= {"id": image["id"] * 100, "file_name": f"some/where/{image['file_name']}"}
        for category in truth["categories"]:
            category |= {"id": category["id"] * 3 + 7}
        (tmp_path / "gt.json").write_text(json.dumps(truth))
        detect([SAMPLES], tmp_path / "plain")
        detect([SAMPLES], tmp_path / "given", annotations=tmp_path / "gt.json")
        plain, given = (json.loads((tmp_path / n / "detections.json").read_text()) for n in ("plain", "given"))
        assert given == [
            {**row, "image_id": row["image_id"] * 100, "category_id": row["category_id"] * 3 + 7} for row in plain
        ]

    def test_an_image_that_the_annotations_do_not_know_is_one_line(self, tmp_path, quick):
        (tmp_path / "gt.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "lake.png"}]}))
        with pytest.raises(ValueError, match=r"3 of 4 images are not in .*gt.json, the first is 'garden.png'"):
            detect([SAMPLES], tmp_path / "out", annotations=tmp_path / "gt.json")
        assert not quick

    def test_detections_of_no_category_are_counted(self, tmp_path, quick):
        images = json.loads((SAMPLES / "ground_truth.json").read_text())["images"]
        truth = {"images": images, "categories": [{"id": 70, "name": "7"}]}
        (tmp_path / "gt.json").write_text(json.dumps(truth))
        summary = detect([SAMPLES], tmp_path / "out", annotations=tmp_path / "gt.json")
        rows = json.loads((tmp_path / "out" / "detections.json").read_text())
        assert {row["category_id"] for row in rows} == {70}
        assert summary.uncategorised == summary.detections - len(rows) > 0

    def test_pictures_are_drawn_for_every_image_under_its_own_name(self, tmp_path, quick):
        images = make_images(tmp_path / "in", 4)
        Image.new("RGB", (60, 40)).save(images / "flat.gif")
        Image.new("RGB", (60, 40)).save(images / "flat.gif.png")
        detect([images], tmp_path / "plain")
        detect([images], tmp_path / "drawn", draw=True)
        assert files_of(tmp_path / "plain").keys() < files_of(tmp_path / "drawn").keys()
        pictures = {p.relative_to(tmp_path / "drawn" / "pictures") for p in tmp_path.rglob("drawn/pictures/**/*.png")}
        readable = {path.relative_to(images) for path in images.rglob("*.png")}
        assert pictures == readable | {Path("flat.gif.png.png")}
        # What was detected without pictures can be drawn afterwards, without detecting.
        done = len(quick)
        assert detect([images], tmp_path / "plain", draw=True).changed
        assert len(quick) == done
        assert files_of(tmp_path / "plain") == files_of(tmp_path / "drawn")
        drawn = np.asarray(Image.open(tmp_path / "drawn" / "pictures" / "a" / "0.png"))
        plain = np.asarray(Image.open(images / "a" / "0.png").convert("RGB"))
        times = drawn.shape[0] // plain.shape[0]
        assert (drawn != plain.repeat(times, 0).repeat(times, 1)).any()


class TestFolders:
    def test_odd_names_and_links_keep_their_rows_apart(self, tmp_path, quick):
        images = tmp_path / "in"
        names = ["a/same.png", "b/same.png", "with space.png", "größe 数字.png", "new\nline.png", "q'uo\"te,[1].png"]
        if sys.platform == "linux":
            names.append(os.fsdecode(b"not-utf8-\xff.png"))
        for number, name in enumerate(names):
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            with (images / name).open("wb") as file:
                Image.open(sample_images()[number % 4]).save(file, "PNG")
        (images / "link.png").symlink_to(images / "a" / "same.png")
        (images / "dangling.png").symlink_to(images / "nowhere.png")
        (images / "linked").symlink_to(images / "a")
        (images / "a" / "up").symlink_to(images)  # a circle
        (images / ".hidden.png").write_bytes(b"")
        (images / "notes.txt").write_text("no image")
        expected = sorted([*names, "link.png", "linked/same.png", "dangling.png"])
        out = images / "results"  # within the folder of images
        result = invoke(images, "--out", out, "--format", "csv", "--format", "coco", "--draw", "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert "skipped dangling.png: a link to a file that does not exist" in result.output
        index = json.loads((out / "images.json").read_text())["images"]
        assert [row["file_name"] for row in index] == expected
        assert [row["id"] for row in index] == list(range(1, len(expected) + 1))
        with (out / "detections.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        assert {row["file_name"] for row in rows} == set(expected) - {"dangling.png"}
        before = len(quick)
        for sources in ([images], [images / "*"], [images / "**"]):
            again = invoke(*sources, "--out", out, "--format", "csv", "--format", "coco", "--draw")
            assert again.exit_code == 0, again.output
            assert len(quick) == before
            assert ("nothing to do" in again.output) == (sources == [images])  # the patterns find fewer
            found = len(json.loads((out / "images.json").read_text())["images"])
            assert found == {"in": 10, "*": 7, "**": 9}[sources[0].name]  # ** goes into no linked folder

    def test_a_file_and_a_pattern_take_what_they_name(self, tmp_path, quick):
        images = make_images(tmp_path / "in", 6)
        shutil.copy(images / "a" / "0.png", images / "a" / "picture.dat")
        (images / "a" / "list[1].png").write_bytes((images / "a" / "0.png").read_bytes())
        found = lambda *sources: subject.find_images([images / source for source in sources]).names  # noqa: E731
        assert found("a/picture.dat") == ["picture.dat"]
        assert found("a/list[1].png") == ["list[1].png"]
        assert found("a/*.dat") == ["picture.dat"]
        assert found("a/*") == ["0.png", "3.png", "list[1].png"]
        assert found("**/0.png") == ["a/0.png", "c/0.png"]
        assert found("a/0.png", "c", "a") == ["a/0.png", "a/3.png", "a/list[1].png", *(f"c/{n}.png" for n in "02")]

    @pytest.mark.parametrize(
        ("sources", "pattern"),
        [
            (["empty"], "no images in .*empty: looked for files ending in"),
            (["empty/*.png"], "no file matches '.*empty/"),
            (["nowhere"], "no image or folder at '.*nowhere'"),
        ],
    )
    def test_nothing_to_run_on_is_one_line_and_status_2(self, tmp_path, monkeypatch, capsys, sources, pattern):
        (tmp_path / "empty").mkdir()
        sources = [str(tmp_path / source) for source in sources]
        monkeypatch.setattr("sys.argv", ["detpost", "detect", *sources, "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1
        assert re.search(pattern, error)
        assert not (tmp_path / "out").exists()

    def test_broken_huge_and_odd_files_are_skipped_and_listed(self, tmp_path, quick):
        images = tmp_path / "in"
        images.mkdir()
        good = io.BytesIO()
        Image.open(sample_images()[1]).convert("RGB").save(good, "JPEG")
        (images / "good.jpg").write_bytes(good.getvalue())
        (images / "truncated.jpg").write_bytes(good.getvalue()[:2000])
        (images / "empty.png").write_bytes(b"")
        (images / "text.png").write_text("no image")
        (images / "broken.png").write_bytes(sample_images()[1].read_bytes()[:60] + b"\0" * 400)
        Image.new("1", (1000, 500)).save(images / "huge.png")
        os.mkfifo(images / "pipe.png")
        Image.new("L", (1, 1)).save(images / "tiny.png")
        Image.new("L", (3000, 1)).save(images / "wide.png")
        result = invoke(images, "--out", tmp_path / "out", "--max-pixels", 100_000)
        assert result.exit_code == 0, result.output
        with (tmp_path / "out" / "skipped.csv").open(newline="") as file:
            skipped = dict(list(csv.reader(file))[1:])
        assert sorted(skipped) == ["broken.png", "empty.png", "huge.png", "pipe.png", "text.png", "truncated.jpg"]
        assert skipped["huge.png"] == "1000 x 500 pixels are more than 100000"
        assert skipped["empty.png"] == "the file is empty"
        assert skipped["pipe.png"] == "not a regular file"
        assert all("\n" not in reason and reason for reason in skipped.values())
        for name, reason in skipped.items():
            assert f"skipped {name}: {reason}" in result.output
        assert "9 images: 9 now, 0 before, 6 skipped" in result.output
        assert invoke(images, "--out", tmp_path / "out", "--strict").exit_code == 1
        assert invoke(SAMPLES, "--out", tmp_path / "all", "--strict").exit_code == 0

    def test_an_image_beyond_pillows_own_limit_is_read_where_ours_allows_it(self, tmp_path, quick, monkeypatch):
        Image.new("L", (300, 200)).save(tmp_path / "large.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        assert not detect([tmp_path / "large.png"], tmp_path / "out").skipped
        assert Image.MAX_IMAGE_PIXELS == 1000

    def test_another_threads_bomb_is_refused_while_a_run_opens_as_large_an_image(
        self, tmp_path, detector, quick, monkeypatch
    ):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many
        Image.new("L", (60, 50)).save(tmp_path / "bomb.png")
        (tmp_path / "images").mkdir()
        shutil.copy(tmp_path / "bomb.png", tmp_path / "images" / "x.png")
        outcomes = []
        one = detector.prepare.one

        def opening(image):  # while the run has the file open
            def other():
                try:
                    with Image.open(tmp_path / "bomb.png"):
                        outcomes.append("opened")
                except Image.DecompressionBombError:
                    outcomes.append("refused")

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            return one(image)

        monkeypatch.setattr(detector.prepare, "one", opening)
        summary = detect([tmp_path / "images"], tmp_path / "out")
        assert (summary.finished, summary.skipped) == (1, ())
        assert outcomes == ["refused"]
        assert Image.MAX_IMAGE_PIXELS == 1000

    def test_an_image_that_the_detector_cannot_take_does_not_end_the_run(self, tmp_path, detector, monkeypatch):
        real = detector.predict_ready

        def fails_on_narrow_images(images, encode_masks=False):
            if any(image.size[1] < 4 for image in images):
                raise RuntimeError("too\nnarrow")
            return real(images, encode_masks)

        monkeypatch.setattr(detector, "predict_ready", fails_on_narrow_images)
        monkeypatch.setattr(Detector, "load", lambda *_, **__: detector)
        shutil.copy(sample_images()[0], tmp_path / "b.png")
        shutil.copy(sample_images()[1], tmp_path / "c.png")
        Image.new("L", (2, 30)).save(tmp_path / "a.png")
        summary = detect([tmp_path], tmp_path / "out")
        assert summary.skipped == (("a.png", "the detector cannot take 2 x 30 pixels: too narrow"),)
        assert summary.detections > 5
        with pytest.raises(RuntimeError, match="narrow"):  # where nothing goes through, it is the model
            detect([tmp_path / "a.png"], tmp_path / "none")


class TestResume:
    def test_a_finished_run_does_nothing_and_says_so(self, tmp_path, quick):
        assert invoke(SAMPLES, "--out", tmp_path).exit_code == 0
        before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if "journal" not in path.name}
        monkey = len(quick)
        result = invoke(SAMPLES, "--out", tmp_path)
        assert "nothing to do: all 4 images are finished" in result.output
        assert len(quick) == monkey
        assert {path: path.stat().st_mtime_ns for path in before} == before
        # Another format is made from what is there.
        result = invoke(SAMPLES, "--out", tmp_path, "--format", "csv")
        assert "4 images: 0 now, 4 before" in result.output
        assert len(quick) == monkey

    def test_new_and_changed_images_alone_are_detected_and_ids_stay(self, tmp_path, quick):
        images = make_images(tmp_path / "in", 6)
        detect([images], tmp_path / "out", formats=("coco", "jsonl"))
        ids = {r["file_name"]: r["id"] for r in json.loads((tmp_path / "out" / "images.json").read_text())["images"]}
        assert sorted(ids.values()) == list(range(1, 8))
        shutil.copy(sample_images()[0], images / "a" / "00.png")
        shutil.copy(sample_images()[1], images / BROKEN)  # mended
        quick.clear()
        summary = detect([images], tmp_path / "out", formats=("coco", "jsonl"))
        assert (summary.finished, summary.resumed, summary.skipped) == (2, 6, ())
        assert sum(quick) == 2
        now = {r["file_name"]: r["id"] for r in json.loads((tmp_path / "out" / "images.json").read_text())["images"]}
        assert now == ids | {"a/00.png": 8}
        lines = (tmp_path / "out" / "detections.jsonl").read_text().splitlines()
        assert len(lines) == len({json.loads(line)["file_name"] for line in lines}) == 8

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"threshold": 0.25}, r"\(threshold 0.5, not 0.25\)"),
            ({"nms": 0.7}, r"\(nms none, not 0.7\)"),
            ({"backend": "compile"}, r"\(backend eager, not compile\)"),
            ({"model": "other"}, r"\(model tiny, not .*other\)"),
        ],
    )
    def test_other_settings_are_refused_in_one_line_unless_fresh(self, tmp_path, quick, options, reason):
        detect([SAMPLES], tmp_path / "out")
        if "model" in options:
            shutil.copytree(SAMPLES.parent / "tiny", tmp_path / "other")
            config = (tmp_path / "other" / "config.json").read_text()
            (tmp_path / "other" / "config.json").write_text(config + "\n")
            options = {"model": tmp_path / "other"}
        before = files_of(tmp_path / "out")
        with pytest.raises(ValueError, match=rf"other settings {reason}: take another folder, or --fresh") as caught:
            detect([SAMPLES], tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
        assert files_of(tmp_path / "out") == before
        assert detect([SAMPLES], tmp_path / "out", fresh=True, **options).finished == 4
        assert detect([SAMPLES], tmp_path / "out", **options).resumed == 4

    def test_another_decode_of_the_same_file_is_refused(self, tmp_path, quick, detector, monkeypatch):
        images = make_images(tmp_path / "in", 3)
        detect([images], tmp_path / "out")
        shutil.copy(sample_images()[0], images / "new.png")
        from dataclasses import replace

        other = Detector(detector.run, detector.prepare, detector.class_names, detector.device, 0.5)
        other.spec = replace(detector.spec, top_k=7)
        monkeypatch.setattr(Detector, "load", lambda *_, **__: other)
        with pytest.raises(ValueError, match="other settings \\(spec"):
            detect([images], tmp_path / "out")

    def test_a_folder_in_use_is_refused(self, tmp_path, quick):
        detect([SAMPLES], tmp_path)
        from detpost.runs.journal import Journal

        with Journal(tmp_path / "detpost-journal.jsonl"), pytest.raises(ValueError, match="another run is writing to"):
            detect([SAMPLES], tmp_path)

    def test_a_foreign_folder_of_pictures_is_left_alone(self, tmp_path, quick):
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "mine.txt").write_text("mine")
        with pytest.raises(ValueError, match="files that detpost did not write"):
            detect([SAMPLES], tmp_path, draw=True)
        detect([SAMPLES], tmp_path, fresh=True)
        assert (tmp_path / "pictures" / "mine.txt").read_text() == "mine"

    @pytest.mark.slow
    def test_killed_anywhere_and_resumed_it_gives_the_same_bytes(self, tmp_path):
        make_images(tmp_path / "in", 7)
        points = [
            "never:0",
            *("write:0:0", "write:0:40", "write:0:-1"),  # in the header
            *("write:1:0", "write:1:100", "write:2:-1", "write:3:300"),  # in a batch
            *("synced:0", "synced:1", "synced:3"),
            *("replace:0", "replace:3", "picture:4"),
        ]
        script = Path(__file__).with_name("killed_runs.py")
        run = subprocess.run(
            [sys.executable, script, tmp_path / "in", tmp_path / "out", *points],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        told = {row["point"]: row for row in map(json.loads, run.stdout.splitlines())}
        expected = tmp_path / "out" / "never_0"
        assert len(journal_rows(expected)) == 8
        assert len(json.loads((expected / "detections.json").read_text())) > 10
        assert told["never:0"]["through"] == 7  # the eighth is broken
        batches = {"write": 0, "synced": 1}
        for point in points[1:]:
            kind, call, *_ = point.split(":")
            assert (told[point]["died"], told[point]["again"]) == (-signal.SIGKILL, 0), run.stderr
            folder = tmp_path / "out" / point.replace(":", "_")
            assert files_of(folder) == files_of(expected), point
            assert journal_rows(folder) == journal_rows(expected), point
            # Work is lost by the batch that was not finished, and by no other: journal write n is batch n.
            if kind in batches:
                assert told[point]["resumed"] == max(0, min(8, 3 * (int(call) - 1 + batches[kind]))), point
        assert told["picture:4"]["resumed"] == 3
        assert told["replace:0"]["through"] == 0

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    @pytest.mark.slow
    def test_the_command_goes_on_where_it_was_stopped(self, tmp_path, number):
        images = make_images(tmp_path / "in", 50)
        command = [sys.executable, "-m", "detpost", "detect", images, "--batch", "1", "--device", "cpu", "--out"]
        running = subprocess.Popen(
            [*command, tmp_path / "out"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A shell's background jobs, and so their tests, ignore an interrupt.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        journal = tmp_path / "out" / "detpost-journal.jsonl"
        while running.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 8):
            time.sleep(0.002)
        running.send_signal(number)
        _, errors = running.communicate(timeout=300)
        assert running.returncode == (-number if number == signal.SIGKILL else 130), errors
        done = journal.read_bytes().count(b"\n") - 1
        assert 8 <= done < 51
        assert not (tmp_path / "out" / "detections.json").exists()
        if number == signal.SIGINT:
            assert errors.decode().startswith("interrupted; what is finished is in ")
            assert len(errors.splitlines()) == 1
            return
        with journal.open("ab") as file:
            file.write(b'{"file_name":"c/half')
        again = subprocess.run([*command, tmp_path / "out"], capture_output=True, text=True, check=True, timeout=300)
        assert f"{done} before" in again.stdout
        detect([images], tmp_path / "whole", batch_size=1, device="cpu")
        ours, whole = (journal_rows(tmp_path / name) for name in ("out", "whole"))
        for one, other in zip(ours, whole, strict=True):  # another process may sum in another order: see the test above
            scores = [row.pop("scores", []) for row in (one, other)], [row.pop("boxes", []) for row in (one, other)]
            assert one == other
            for mine, theirs in scores:
                np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3)


def test_a_file_with_a_fixed_batch_takes_any_batch(tmp_path, detector):
    from detpost.export import to_onnx

    to_onnx("tiny", tmp_path / "one.onnx", dynamic_batch=False)
    detector.threshold = 0.5
    for batch in (1, 3):
        detect([SAMPLES], tmp_path / f"{batch}", model=tmp_path / "one.onnx", batch_size=batch)
    one, three = ((tmp_path / f"{batch}" / "detections.json").read_bytes() for batch in (1, 3))
    assert one == three
    assert len(json.loads(one)) == sum(len(row["scores"]) for row in detector.predict(sample_images()))


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"formats": ("xml",)}, "unknown format 'xml': take one of coco, jsonl, csv, parquet"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"workers": 0}, "workers must be at least 1; got 0"),
        ({"threshold": 2.0}, r"threshold must lie within \[0, 1\]; got 2.0"),
        ({"nms": 2.0}, r"nms must be an IoU within \[0, 1\]; got 2.0"),
        ({"backend": "quantum"}, "unknown backend 'quantum'"),
    ],
)
def test_an_argument_out_of_range_is_one_line(tmp_path, options, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        detect([SAMPLES], tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "detpost-journal.jsonl").exists()


def test_the_option_nms_drops_doubled_boxes_and_its_results_say_so(tmp_path):
    images = ["detect", str(SAMPLES), "--format", "jsonl", "-o"]
    CliRunner().invoke(app, [*images, str(tmp_path / "every")], catch_exceptions=False)
    CliRunner().invoke(app, [*images, str(tmp_path / "kept"), "--nms", "0.7"], catch_exceptions=False)
    every, kept = (
        {
            row["file_name"]: [found["score"] for found in row["detections"]]
            for row in map(json.loads, (tmp_path / name / "detections.jsonl").read_text().splitlines())
        }
        for name in ("every", "kept")
    )
    doubled = every.pop("petals.png")
    assert kept.pop("petals.png") == doubled[:-1]
    assert kept == every
    header = json.loads((tmp_path / "kept" / "detpost-journal.jsonl").read_text().splitlines()[0])
    assert header["settings"]["nms"] == 0.7


def test_a_missing_model_file_is_one_line(tmp_path):
    with pytest.raises(OSError, match=r"no file missing\.onnx"):
        detect([SAMPLES], tmp_path, model="missing.onnx")


def test_a_hub_id_goes_by_its_commit_and_one_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    import transformers.utils

    def missing(name, file):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(transformers.utils, "cached_file", missing)
    with pytest.raises(OSError, match=r"no detector at 'no/such', neither a file, .*: We couldn't connect$") as caught:
        detect([SAMPLES], tmp_path / "out", model="no/such")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    place = "/cache/models--a--b/snapshots/0123abc/config.json"
    monkeypatch.setattr(transformers.utils, "cached_file", lambda name, file: place)
    assert settings_of("a/b", "eager", 0.5)["model_identity"] == "commit 0123abc"
