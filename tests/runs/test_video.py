"""Detection in videos: which frames, at which time, and what comes out."""

import csv
import functools
import http.server
import json
import struct
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import detpost.runs.video as subject
from detpost import Detector
from detpost.command.cli import app
from detpost.runs.tiles import Tiling
from detpost.runs.video import detect_video, is_video
from detpost.zoo import SAMPLES, sample_images

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def tiny():
    return Detector.load("tiny", device="cpu")


@pytest.fixture(autouse=True)
def quick(tiny, monkeypatch):
    """Load the model once for all tests."""

    def load(model, backend="eager", device=None, threshold=0.5, nms=None, **trusted):
        tiny.threshold, tiny.nms = threshold, nms
        return tiny

    monkeypatch.setattr(Detector, "load", load)


def write_video(path, pictures, ticks=None, codec="ffv1", base=Fraction(1, 1000), size=(160, 128)):
    """Write pictures (W x H) at times in ticks, without loss by default."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.codec_context.time_base = base
        stream.options = {"g": "4"}
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture.resize(size))
            frame.pts, frame.time_base = number * 100 if ticks is None else ticks[number], base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Make 2.4 seconds of the samples, ten frames a second."""
    samples = [Image.open(path).convert("RGB") for path in sample_images()]
    pictures = [
        samples[number // 2 % 4].transpose(Image.Transpose.ROTATE_180) if number % 2 else samples[number // 2 % 4]
        for number in range(24)
    ]
    return write_video(tmp_path_factory.mktemp("video") / "clip.mkv", pictures), [
        each.resize((160, 128)) for each in pictures
    ]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "detections.jsonl").read_text().splitlines()]


class TestFrames:
    def test_every_frame_has_its_time_and_what_predict_finds_in_it(self, tmp_path, clip, tiny):
        path, pictures = clip
        summary = detect_video(path, tmp_path, formats=("jsonl", "csv"), batch_size=5)
        lines = lines_of(tmp_path)
        assert [line["frame"] for line in lines] == list(range(24))
        assert [line["time"] for line in lines] == pytest.approx([number / 10 for number in range(24)])
        assert {(line["width"], line["height"]) for line in lines} == {(160, 128)}
        expected = tiny.predict(pictures, batch_size=5)
        for line, image in zip(lines, expected, strict=True):
            assert [each["label"] for each in line["detections"]] == image["labels"].tolist()
            np.testing.assert_allclose([each["score"] for each in line["detections"]], image["scores"], rtol=1e-4)
        with (tmp_path / "detections.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        flat = [(line["frame"], line["time"], each) for line in lines for each in line["detections"]]
        assert [(int(row["frame"]), float(row["time"]), float(row["score"])) for row in rows] == [
            (frame, seconds, each["score"]) for frame, seconds, each in flat
        ]
        assert (summary.frames, summary.detections, summary.unreadable, summary.stopped) == (24, len(flat), 0, "")
        assert len(flat) > 30

    @pytest.mark.parametrize(
        ("options", "frames"),
        [
            ({"stride": 5}, range(0, 24, 5)),
            ({"start": 0.95, "end": 1.5}, range(10, 15)),
            ({"start": 1.0, "stride": 4}, range(10, 24, 4)),
            ({"end": 0.05}, range(1)),
        ],
    )
    def test_stride_start_and_end_choose_frames(self, tmp_path, clip, options, frames):
        detect_video(clip[0], tmp_path / "whole", batch_size=1)
        detect_video(clip[0], tmp_path / "part", batch_size=1, **options)
        whole, part = lines_of(tmp_path / "whole"), lines_of(tmp_path / "part")
        first = frames[0]
        assert [line["frame"] for line in part] == [number - first for number in frames]
        assert [{**line, "frame": 0} for line in part] == [{**whole[number], "frame": 0} for number in frames]

    def test_times_are_those_of_the_file_where_frames_are_not_equally_long(self, tmp_path, clip):
        ticks = [500, 540, 900, 2000, 2010]
        path = write_video(tmp_path / "odd.mkv", clip[1][:5], ticks)
        detect_video(path, tmp_path / "out", draw=True)
        seconds = [line["time"] for line in lines_of(tmp_path / "out")]
        assert seconds == pytest.approx([(tick - 500) / 1000 for tick in ticks])
        with av.open(str(tmp_path / "out" / "annotated.mp4")) as container:
            assert [frame.time for frame in container.decode(video=0)] == pytest.approx(seconds, abs=1e-3)

    def test_frames_are_turned_as_a_player_turns_them(self):
        pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
        assert subject._upright(pixels, 0).tolist() == pixels.tolist()
        quarter = subject._upright(pixels, -90)  # clockwise, as telephones are held
        assert quarter.shape == (3, 2, 3)
        assert quarter[0].tolist() == [pixels[1, 0].tolist(), pixels[0, 0].tolist()]
        assert subject._upright(pixels, 180).tolist() == pixels[::-1, ::-1].tolist()

    def test_a_file_that_says_it_was_filmed_upright_is_turned(self, tmp_path):
        picture = np.zeros((128, 160, 3), np.uint8)
        picture[:40, :60] = 255  # top left
        path = write_video(tmp_path / "held.mp4", [Image.fromarray(picture)] * 3, codec="libx264")
        content = path.read_bytes()
        place = content.index(b"tkhd") + 44  # the matrix of the track's header: x' = -y, y' = x, a quarter clockwise
        matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 128 << 16, 0, 1 << 30)
        path.write_bytes(content[:place] + matrix + content[place + 36 :])
        detect_video(path, tmp_path / "out", draw=True)
        assert {(line["width"], line["height"]) for line in lines_of(tmp_path / "out")} == {(128, 160)}
        with av.open(str(tmp_path / "out" / "annotated.mp4")) as container:
            shown = next(container.decode(video=0)).to_ndarray(format="gray").astype(int)
        height, width = shown.shape
        assert shown[height // 8, width - width // 8] > 200
        assert shown[height // 8, width // 8] < 50

    def test_frames_can_be_cut_into_tiles(self, tmp_path, clip):
        detect_video(clip[0], tmp_path, end=0.15, tiling=Tiling(96), threshold=0.3)
        assert max(each["box"][2] for line in lines_of(tmp_path) for each in line["detections"]) > 96

    def test_nms_drops_doubled_boxes_in_frames_as_in_images(self, tmp_path, clip):
        every, kept = (
            detect_video(clip[0], tmp_path / f"{nms}", end=0.3, threshold=0.1, nms=nms).detections
            for nms in (None, 0.5)
        )
        assert 0 < kept < every


class TestAnnotated:
    def test_the_video_has_the_frames_with_boxes(self, tmp_path, clip):
        path, pictures = clip
        summary = detect_video(path, tmp_path, draw=True, stride=2, batch_size=3)
        assert summary.files == (tmp_path / "detections.jsonl", tmp_path / "annotated.mp4")
        with av.open(str(tmp_path / "annotated.mp4")) as container:
            frames = list(container.decode(video=0))
        assert [frame.time for frame in frames] == pytest.approx([number / 5 for number in range(12)], abs=1e-3)
        times = frames[0].width // 160  # small frames are drawn larger
        assert (frames[0].width, frames[0].height) == (160 * times, 128 * times)
        for frame, picture in zip(frames, pictures[::2], strict=True):
            shown = frame.to_ndarray(format="rgb24").astype(int)
            plain = np.asarray(picture).repeat(times, 0).repeat(times, 1).astype(int)
            share = (np.abs(shown - plain).max(axis=2) > 60).mean()
            assert 0.002 < share < 0.5  # boxes and captions, on the picture

    def test_odd_sides_and_empty_frames_are_encoded(self, tmp_path):
        pictures = [Image.new("RGB", (701, 655))] * 3
        path = write_video(tmp_path / "odd.mkv", pictures, size=(701, 655))
        detect_video(path, tmp_path / "out", draw=True)
        assert [line["detections"] for line in lines_of(tmp_path / "out")] == [[], [], []]
        with av.open(str(tmp_path / "out" / "annotated.mp4")) as container:
            assert [(frame.width, frame.height) for frame in container.decode(video=0)] == [(702, 656)] * 3


class TestThreads:
    def test_decoding_network_and_writing_overlap(self, tmp_path, clip, tiny, monkeypatch):
        inside, together = set(), set()

        def slowed(name, call):
            def run(*arguments, **options):
                inside.add(name)
                time.sleep(0.02)
                together.add(frozenset(inside))
                try:
                    return call(*arguments, **options)
                finally:
                    inside.discard(name)

            return run

        monkeypatch.setattr(subject, "prepared", slowed("decoding", subject.prepared))
        monkeypatch.setattr(subject, "detect_batch", slowed("network", subject.detect_batch))
        monkeypatch.setattr(subject, "detections_of", slowed("writing", subject.detections_of))
        detect_video(clip[0], tmp_path, batch_size=2)
        assert frozenset({"decoding", "network", "writing"}) in together
        assert [line["frame"] for line in lines_of(tmp_path)] == list(range(24))

    def test_what_waits_is_bounded(self, tmp_path, clip, monkeypatch):
        read, through, most = [], [0], [0]
        plain, network = subject.prepared, subject.detect_batch

        def reading(*arguments):
            read.append(1)
            return plain(*arguments)

        def slow(detector, batch, *rest):
            time.sleep(0.05)
            through[0] += len(batch)
            most[0] = max(most[0], len(read) - through[0])
            return network(detector, batch, *rest)

        monkeypatch.setattr(subject, "prepared", reading)
        monkeypatch.setattr(subject, "detect_batch", slow)
        detect_video(clip[0], tmp_path, batch_size=2)
        assert 0 < most[0] <= 3 * 2  # one that waits for room, one that waits, one that is being read

    def test_ctrl_c_keeps_what_was_found(self, tmp_path, clip, monkeypatch):
        network, calls = subject.detect_batch, iter(range(100))

        def interrupted(*arguments):
            if next(calls) == 3:
                raise KeyboardInterrupt
            return network(*arguments)

        monkeypatch.setattr(subject, "detect_batch", interrupted)
        summary = detect_video(clip[0], tmp_path, batch_size=2, draw=True)
        assert (summary.frames, summary.stopped) == (6, "interrupted")
        assert len(lines_of(tmp_path)) == 6
        with av.open(str(tmp_path / "annotated.mp4")) as container:
            assert len(list(container.decode(video=0))) == 6
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("detpost-")]

    def test_what_a_thread_raises_ends_the_run_and_leaves_no_results(self, tmp_path, clip, monkeypatch):
        def full(row):
            raise OSError("no space left")

        monkeypatch.setattr(subject, "detections_of", full)
        with pytest.raises(OSError, match="no space left"):
            detect_video(clip[0], tmp_path / "out", batch_size=2)
        assert not list((tmp_path / "out").iterdir())
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("detpost-")]


class TestSources:
    def test_a_file_that_breaks_off_gives_what_is_in_it(self, tmp_path, clip):
        content = clip[0].read_bytes()
        (tmp_path / "short.mkv").write_bytes(content[: len(content) // 2])
        summary = detect_video(tmp_path / "short.mkv", tmp_path / "out")
        assert 5 < summary.frames < 24
        assert len(lines_of(tmp_path / "out")) == summary.frames

    def test_an_address_is_read_as_it_comes(self, tmp_path, clip):
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass

        handler = functools.partial(Quiet, directory=clip[0].parent)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                address = f"http://127.0.0.1:{server.server_address[1]}/clip.mkv"
                assert detect_video(address, tmp_path / "read", batch_size=4).frames == 24
                with pytest.raises(OSError, match=r"cannot open video 'http.*none.mp4'"):
                    detect_video(address.replace("clip.mkv", "none.mp4"), tmp_path / "none")
            finally:
                server.shutdown()
                thread.join()
        detect_video(clip[0], tmp_path / "file", batch_size=4)
        assert lines_of(tmp_path / "read") == lines_of(tmp_path / "file")

    def test_packets_that_cannot_be_decoded_are_counted(self, tmp_path, clip):
        path = write_video(tmp_path / "hole.mkv", clip[1], codec="libx264")
        with av.open(str(path)) as container:
            packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
        content = path.read_bytes()
        place = content.index(packets[8])  # one of those that begin anew
        path.write_bytes(content[:place] + bytes([255]) * len(packets[8]) + content[place + len(packets[8]) :])
        summary = detect_video(path, tmp_path / "out")
        assert (summary.unreadable, summary.frames) == (1, 23)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"formats": ("coco",)}, "results of a video are written as jsonl or csv; got coco"),
            ({"stride": 0}, "stride must be at least 1; got 0"),
            ({"start": 2, "end": 1}, "0 <= start < end; got 2 and 1"),
            ({"start": 9}, "no frame that can be decoded from 9 s on"),
            ({"threshold": 2}, r"threshold must lie within \[0, 1\]; got 2"),
        ],
    )
    def test_what_cannot_be_is_one_line_and_writes_nothing(self, tmp_path, clip, options, reason):
        with pytest.raises(ValueError, match=reason):
            detect_video(clip[0], tmp_path / "out", **options)
        assert not list(tmp_path.glob("out/*"))

    def test_what_is_no_video_is_one_line(self, tmp_path):
        (tmp_path / "text.mp4").write_text("no video")
        for name, reason in (("text.mp4", "cannot open video"), ("nowhere.mp4", "cannot open video .*No such file")):
            with pytest.raises(OSError, match=reason) as caught:
                detect_video(tmp_path / name, tmp_path / "out")
            assert "\n" not in str(caught.value)

    def test_results_that_are_there_are_not_written_over(self, tmp_path, clip):
        detect_video(clip[0], tmp_path, end=0.3)
        before = (tmp_path / "detections.jsonl").read_bytes()
        with pytest.raises(ValueError, match=r"detections.jsonl is there already: take another folder, or --fresh"):
            detect_video(clip[0], tmp_path)
        assert (tmp_path / "detections.jsonl").read_bytes() == before
        assert detect_video(clip[0], tmp_path, fresh=True).frames == len(lines_of(tmp_path)) == 24

    def test_videos_are_told_from_images(self, tmp_path):
        (tmp_path / "folder.mp4").mkdir()
        assert all(map(is_video, ["a.mp4", "b.MKV", "rtsp://camera/1", "https://host/a.m3u8?key=1", "udp://:9000"]))
        assert not any(map(is_video, ["a.png", "photos", "s3://bucket/photos", "*.jpg", tmp_path / "folder.mp4"]))


class TestCommand:
    def test_the_options_are_those_of_the_run(self, tmp_path, clip):
        options = ["--stride", "3", "--start", "0.5", "--end", "2", "--draw", "--format", "jsonl", "--format", "csv"]
        result = CliRunner().invoke(app, ["detect", str(clip[0]), "--out", str(tmp_path / "a"), *options])
        assert result.exit_code == 0, result.output
        assert "5 frames; " in result.output
        detect_video(clip[0], tmp_path / "b", stride=3, start=0.5, end=2, formats=("jsonl", "csv"))
        for name in ("detections.jsonl", "detections.csv"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / "annotated.mp4").exists()

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (["clip.mp4", "other.mp4"], "a video goes alone; got 2 sources: name one"),
            (["clip.mp4", "--workers", "2"], "a video takes no --workers"),
            (["clip.mp4", "--engine", "ray"], "a video takes no --engine"),
            (["clip.mp4", "--max-pixels", "9"], "a video takes no --max-pixels"),
            ([str(SAMPLES), "--stride", "2"], "--stride is for a video: leave it out"),
        ],
    )
    def test_what_does_not_go_together_is_one_line(self, tmp_path, options, reason):
        result = CliRunner().invoke(app, ["detect", *options, "--out", str(tmp_path / "out")])
        assert isinstance(result.exception, ValueError)
        assert reason in str(result.exception)
