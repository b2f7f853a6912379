"""The benchmark measures what it says."""

import json
import time
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.race import Row, _peaks, _race, _that_run, run_benchmark
from benchmarks.report import write_json, write_plot, write_table
from benchmarks.tasks import Task
from detpost.kernels.cpu import library


def test_a_race_gives_medians_and_ratios_to_detpost():
    contenders = {"detpost": lambda turn: time.sleep(0.005), "slow": lambda turn: time.sleep(0.03)}
    rows = {row.name: row for row in _race("task", (1,), contenders, seconds=0.2)}
    assert rows["detpost"].ratio == 1
    assert 1.5 < rows["slow"].ratio < 20  # of six, on a machine that may be busy
    assert rows["detpost"].microseconds > 4900


def test_one_task_alone_and_none_of_a_wrong_name():
    assert {row.task for row in run_benchmark(quick=True, only="distance_transform_edt")} == {"distance_transform_edt"}
    with pytest.raises(ValueError, match="no task 'decoding': take one of decode, Hausdorff"):
        run_benchmark(only="decoding")


def test_inputs_take_turns():
    seen = []
    _race("task", (1,), {"detpost": seen.append}, seconds=0.01)
    assert set(seen) == set(range(8))


def test_a_peer_that_fails_is_left_out_by_name_and_detpost_never():
    def fails(turn):
        raise RuntimeError("expects sizes\nto sum")

    said = []
    task = Task("decode", (1, 2), {"detpost": len, "a peer": fails, "another": abs})
    with pytest.raises(TypeError):
        _that_run(task, said.append)
    task = Task("decode", (1, 2), {"detpost": abs, "a peer": fails, "another": abs})
    assert list(_that_run(task, said.append)) == ["detpost", "another"]
    assert said == ["decode 1x2: without a peer, which fails (RuntimeError: expects sizes to sum)"]


def test_what_runs_before_a_cold_call_is_not_timed():
    class Prepared:
        prepared = 0

        def prepare(self):
            self.prepared += 1
            time.sleep(0.02)

        def __call__(self, turn):
            assert self.prepared
            time.sleep(0.001)

    contender = Prepared()
    rows = _race("task", (1,), {"detpost": contender}, seconds=0.01)
    assert contender.prepared >= 3
    assert rows[0].microseconds < 20_000


def test_a_long_preparation_does_not_make_a_race_endless():
    class Prepared:
        prepared = 0

        def prepare(self):
            self.prepared += 1
            time.sleep(0.02)

        def __call__(self, turn):
            pass

    contender = Prepared()
    _race("task", (1,), {"detpost": contender}, seconds=0.1, longest=0.1)
    assert contender.prepared < 100  # 0.1 seconds of calls alone would be many thousands


@pytest.mark.slow
@pytest.mark.peers
def test_every_installed_peer_takes_part(tmp_path):
    wanted = {
        "decode": {"detpost", "detpost (aten)", "detpost (numpy)", "transformers", "kornia", "RT-DETR (in place)"},
        "raw outputs to lists, softmax": {"detpost", "detpost (per_image)", "detpost (aten)", "transformers"},
        "drop-in: kornia": {"detpost", "kornia", "detpost, cold", "kornia, cold"},
        "drop-in: RT-DETR": {"detpost", "RT-DETR (in place)", "detpost, cold"},
        "decode of one image, warm and cold": {
            *("detpost", "detpost, after a network", "detpost, cold", "kornia, cold"),
            *("read of the logits", "read of the logits, cold"),
        },
        "decode with gradient, forward + backward": {"detpost", "detpost (aten)", "kornia"},
        "nms": {"detpost", "detpost (aten)", "torchvision"},
        "distance_transform_edt": {"detpost", "detpost (aten)", "scipy"},
    }
    rows = []
    for task, contenders in wanted.items():
        of_task = run_benchmark(quick=True, only=task)
        assert contenders <= {row.name for row in of_task}, task
        rows += of_task
    write_json(rows, tmp_path / "bench.json")
    write_plot(rows, tmp_path / "bench.png")
    write_table(rows, tmp_path / "bench.md")
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][0]["task"] == "decode"
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert (tmp_path / "bench.md").read_text().count("\n| nms |") == 1


def test_every_contender_has_a_colour_of_its_own():
    same = {"in place": "RT-DETR (in place)", "out of place": "detpost (aten)"}  # the same code under two headings
    for name, other in same.items():
        assert report._COLOURS[name] == report._COLOURS[other]
    colours = [colour for name, colour in report._COLOURS.items() if name not in same]
    assert len(set(colours)) == len(colours)


def test_the_files_say_where_and_when(tmp_path):
    write_json([Row("decode", (1, 2, 3), "detpost", 5.0, 1.0)], tmp_path / "new" / "bench.json")
    said = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert said["versions"]["torch"]
    assert said["date"]
    row = {"task": "decode", "size": [1, 2, 3], "name": "detpost", "microseconds": 5.0, "ratio": 1.0}
    assert said["rows"] == [row | {"device": "cpu", "peak_bytes": None}]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")
@pytest.mark.slow
def test_peak_memory_is_that_of_one_run():
    task = Task("HausdorffERLoss forward + backward", (2, 2, 256, 256), {}, with_memory=True)
    peaks = _peaks(task, "cpu")
    own, plain = peaks["detpost"], peaks["detpost (aten)"]
    field = 2 * 2 * 256 * 256 * 4
    assert plain > 10 * field  # every erosion is kept
    assert own < plain / 2 or library.missing() is not None
