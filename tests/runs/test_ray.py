"""Runs on Ray Data: whatever the cluster and whoever dies, the result of one process, to the bit."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
pytest.importorskip("ray.data")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as parquet  # noqa: E402

from detpost import Detector  # noqa: E402
from detpost.command.cli import app  # noqa: E402
from detpost.runs.detect import detect as detect_here  # noqa: E402
from detpost.runs.ray import _joined as joined  # noqa: E402
from detpost.runs.ray import detect  # noqa: E402
from detpost.runs.tiles import Tiling  # noqa: E402
from detpost.zoo import SAMPLES  # noqa: E402
from tests.runs.raw_outputs import Maker, give, given_detector, make_noise  # noqa: E402

COUNT = 60
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detpost.runs.ray._SHARED_BYTES", 128 * 1024**2)
        with joined(ray, None, 1):
            yield


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    give(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def expected(given):
    """Give the result of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Detector, "load", lambda *_, **__: Maker(given)())
        summary = detect_here([given / "images"], given / "here", batch_size=3, formats=("parquet", "coco", "csv"))
    assert (summary.images, len(summary.skipped)) == (COUNT + 2, 2)
    assert summary.detections > 3 * COUNT
    return given / "here"


def rows(folder):
    return parquet.read_table(folder / "detections.parquet").replace_schema_metadata(None)


def parts_of(folder):
    return len(list((folder / "parts").glob("*.parquet")))


class TestSameResult:
    @pytest.mark.parametrize(("actors", "batch"), [(1, 1), (2, 8), (4, 5)])
    def test_whatever_the_number_of_actors_and_the_batch(self, cluster, given, expected, tmp_path, actors, batch):
        summary = detect([given / "images"], tmp_path, model=Maker(given), actors=actors, batch_size=batch)
        assert rows(tmp_path).equals(rows(expected))
        assert (summary.images, summary.finished, summary.resumed) == (COUNT + 2, COUNT + 2, 0)
        assert summary.skipped == (
            ("a/broken.jpg", "image file is truncated (0 bytes not processed)"),
            ("b/empty.png", "the file is empty"),
        ) or {name for name, _ in summary.skipped} == {"a/broken.jpg", "b/empty.png"}

    def test_whoever_dies_on_the_way(self, cluster, given, expected, tmp_path):
        maker = Maker(given, dies=("network", "decoding"))
        summary = detect([given / "images"], tmp_path, model=maker, actors=2, batch_size=4)
        assert (given / "network").exists()
        assert (given / "decoding").exists()
        assert rows(tmp_path).equals(rows(expected))
        assert summary.finished == COUNT + 2

    def test_a_run_whose_driver_is_killed_three_times(self, cluster, given, expected, tmp_path):
        script = Path(__file__).with_name("run_on_ray.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        address = ray.get_runtime_context().gcs_address
        deaths = 0
        for batch, actors in ((2, 1), (3, 2), (2, 1), (4, 1)):
            before = parts_of(tmp_path)
            command = [sys.executable, script, given, tmp_path, str(batch), str(actors), address]
            running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            while deaths < 3 and running.poll() is None and parts_of(tmp_path) <= before + deaths:
                time.sleep(0.01)
            if deaths < 3 and running.poll() is None:
                running.send_signal(signal.SIGKILL)
                deaths += 1
            output, _ = running.communicate(timeout=900)
        assert deaths == 3
        images, finished, resumed = map(int, output.split())
        assert (images, finished + resumed) == (COUNT + 2, COUNT + 2)
        assert resumed > 0
        assert rows(tmp_path).equals(rows(expected))

    def test_a_node_that_is_lost(self, given, expected, tmp_path):
        script = """
import sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from tests.runs.raw_outputs import Maker
from detpost.runs.ray import detect
given, out = map(Path, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20})
node = cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)
def lose():
    while len(list((out / "parts").glob("*"))) < 2:
        time.sleep(0.01)
    cluster.remove_node(node, allow_graceful=False)
    print("lost", flush=True)
threading.Thread(target=lose, daemon=True).start()
print(detect([given / "images"], out, model=Maker(given), actors=2, batch_size=2, address=cluster.address).finished)
"""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", script, str(given), str(tmp_path)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900, env=environment)
        said = [line for line in ran.stdout.splitlines() if line == "lost" or line.isdigit()]  # and not Ray's own
        assert said == ["lost", str(COUNT + 2)]
        assert rows(tmp_path).equals(rows(expected))

    def test_tiles_are_cut_and_merged_as_on_one_machine(self, cluster, tmp_path, monkeypatch):
        (tmp_path / "images").mkdir()
        make_noise(tmp_path / "images")
        options = {"tiling": Tiling(64, 0.3), "batch_size": 3}
        summary = detect([tmp_path / "images"], tmp_path / "there", model=given_detector, actors=1, **options)
        monkeypatch.setattr(Detector, "load", lambda *_, **__: given_detector())
        detect_here([tmp_path / "images"], tmp_path / "here", formats=("parquet",), **options)
        assert rows(tmp_path / "there").equals(rows(tmp_path / "here"))
        assert summary.detections > 7 * 3
        with pytest.raises(ValueError, match=r"other settings \(tiles 64 overlap 0.3 nmm, not none\)"):
            detect([tmp_path / "images"], tmp_path / "there", model=given_detector)


class TestResume:
    def test_a_finished_run_does_nothing_and_new_images_alone_are_detected(self, cluster, given, expected, tmp_path):
        images = tmp_path / "images"
        shutil.copytree(given / "images", images)
        late = sorted(images.rglob("*.png"))[5:25]
        for path in late:
            path.rename(path.with_suffix(".late"))
        out = tmp_path / "out"
        first = detect([images], out, model=Maker(given), actors=1)
        assert first.finished == COUNT + 2 - 20
        ids = dict(zip(*(rows(out)[name].to_pylist() for name in ("file_name", "image_id")), strict=True))
        assert sorted(ids.values()) == [*range(1, first.images + 1)]
        again = detect([images], out, model=Maker(given))
        assert (again.finished, again.changed) == (0, False)
        for path in late:
            path.with_suffix(".late").rename(path)
        grown = detect([images], out, model=Maker(given), actors=1)
        assert (grown.finished, grown.resumed) == (20, first.images)
        numbered = rows(out)
        assert numbered.drop_columns(["image_id"]).equals(rows(expected).drop_columns(["image_id"]))
        now = dict(zip(*(numbered[name].to_pylist() for name in ("file_name", "image_id")), strict=True))
        assert {name: now[name] for name in ids} == ids
        assert [now[name] for name in sorted(now.keys() - ids.keys())] == [*range(len(ids) + 1, COUNT + 3)]

    def test_other_settings_and_a_run_of_one_process_are_refused(self, given, expected, tmp_path):
        with pytest.raises(ValueError, match="holds a run without --engine ray: go on without it"):
            detect([given / "images"], expected, model=Maker(given))
        (tmp_path / "detpost-run.json").write_text(
            json.dumps({"settings": {"model": "tiny", "model_identity": "x", "backend": "eager", "threshold": 0.5}})
        )
        with pytest.raises(ValueError, match=r"other settings \(model tiny, not .*Maker\)"):
            detect([given / "images"], tmp_path, model=Maker(given))
        with pytest.raises(ValueError, match="holds a run of --engine ray: go on with it"):
            detect_here([given / "images"], tmp_path, device="cpu")


class TestSources:
    """The same images out of Parquet, webdataset, arrays and another file system."""

    @pytest.fixture(scope="class")
    def by_name(self, expected):
        columns = ["file_name", "width", "height", "boxes", "scores", "labels", "label_names", "error"]
        return {row["file_name"]: row for row in rows(expected).select(columns).to_pylist()}

    def check(self, out, by_name, names):
        found = rows(out).select([*next(iter(by_name.values()))]).to_pylist()
        assert [row["file_name"] for row in found] == sorted(names)
        for row in found:
            wanted = by_name[names[row["file_name"]]]
            assert {**row, "file_name": ""} == {**wanted, "file_name": ""}

    def test_parquet(self, cluster, given, by_name, tmp_path):
        names = sorted(by_name)
        table = pa.table(
            {
                "uid": [f"row-{name}" for name in names],
                "image": [{"bytes": (given / "images" / name).read_bytes(), "path": name} for name in names],
                "other": names,
            }
        )
        for part in range(3):
            parquet.write_table(table.slice(part * 21, 21), tmp_path / f"{part}.parquet")
        out = tmp_path / "out"
        detect(tmp_path, out, model=Maker(given), actors=1)
        self.check(out, by_name, {f"row-{name}": name for name in names})
        assert detect(tmp_path, out, model=Maker(given), actors=1).finished == 0

    def test_webdataset(self, cluster, given, by_name, tmp_path):
        names = sorted(name for name in by_name if name.endswith(".png"))
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            for name in names:
                tar.add(given / "images" / name, name)
        detect(str(tmp_path / "*.tar"), tmp_path / "out", model=Maker(given), actors=1)
        self.check(tmp_path / "out", by_name, {name.removesuffix(".png"): name for name in names})

    def test_a_dataset_of_arrays_from_rays_own_reader(self, cluster, given, by_name, tmp_path):
        paths = {str(given / "images" / name): name for name in by_name if by_name[name]["error"] is None}
        dataset = ray.data.read_images([*paths], include_paths=True, mode="RGB")
        detect(dataset, tmp_path, model=Maker(given), actors=1)
        self.check(tmp_path, by_name, paths)

    def test_addresses_for_images_and_results(self, cluster, given, by_name, tmp_path):
        # fsspec's own handler of local files, which pyarrow does not know: any other of fsspec's goes the same way.
        out = f"local://{tmp_path}/out"
        detect(f"local://{given}/images", out, model=Maker(given), actors=1)
        self.check(tmp_path / "out", by_name, {name: name for name in by_name})
        assert detect(f"local://{given}/images", out, model=Maker(given)).finished == 0

    def test_a_dataset_without_names_is_one_line(self, cluster, given, tmp_path):
        dataset = ray.data.from_items([{"image": np.zeros((4, 4, 3), np.uint8)}])
        with pytest.raises(ValueError, match="no column of names among image: name it with --name-column") as caught:
            detect(dataset, tmp_path, model=Maker(given), actors=1)
        assert "\n" not in str(caught.value)


class TestFailures:
    def test_a_model_that_fails_is_one_line_and_not_a_million_bad_images(self, cluster, given, tmp_path):
        def make():
            detector = Maker(given)()

            def run(*_):
                raise RuntimeError("out of\nluck")

            detector.run = run
            if hasattr(detector, "find"):
                detector.find = run
            return detector

        with pytest.raises(RuntimeError, match="out of") as caught:
            detect([given / "images"], tmp_path, model=make, actors=1)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("options", "pattern"),
        [
            ({"actors": 0}, "actors must be at least 1; got 0"),
            ({"threshold": 2.0}, "threshold must lie within"),
            ({"device": "cuda"}, "device 'cuda' needs a GPU, and Ray has none"),
        ],
    )
    def test_an_argument_out_of_range_is_one_line(self, cluster, given, tmp_path, options, pattern):
        with pytest.raises(ValueError, match=pattern):
            detect([given / "images"], tmp_path, model=Maker(given), **options)

    def test_the_command_takes_no_options_of_the_other_engine(self, tmp_path):
        for option, engine in (("--draw", "ray"), ("--actors=2", "local")):
            result = CliRunner().invoke(
                app, ["detect", str(SAMPLES), "--out", str(tmp_path), option, "--engine", engine]
            )
            assert str(result.exception) == f"--engine {engine} takes no {option.split('=')[0]}: leave it out"


def test_the_command_with_the_real_detector_gives_the_images_of_one_process(cluster, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(SAMPLES, images)
    shutil.copy(next(images.glob("*.png")), images / "größe 数字.png")
    buffer = io.BytesIO()
    Image.open(next(images.glob("*.png"))).convert("RGB").save(buffer, "JPEG")
    (images / "truncated.jpg").write_bytes(buffer.getvalue()[:900])
    options = ["--device=cpu", "--nms=0.7", "--format=coco", "--format=parquet"]
    command = ["detect", str(images), *options, "--out"]
    here = CliRunner().invoke(app, [*command, str(tmp_path / "here")])
    there = CliRunner().invoke(app, [*command, str(tmp_path / "there"), "--engine", "ray", "--actors", "1"])
    assert here.exit_code == there.exit_code == 0, there.output
    assert here.output.replace("here", "there").splitlines()[-1] == there.output.splitlines()[-1]
    ours, theirs = rows(tmp_path / "here").to_pylist(), rows(tmp_path / "there").to_pylist()
    for one, other in zip(ours, theirs, strict=True):
        for name in ("scores", "boxes"):
            np.testing.assert_allclose(one.pop(name) or 0, other.pop(name) or 0, rtol=1e-3, atol=1e-3)
        assert one == other
    assert parquet.read_schema(tmp_path / "there" / "detections.parquet").metadata == (
        parquet.read_schema(tmp_path / "here" / "detections.parquet").metadata
    )
