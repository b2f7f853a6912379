"""The benchmark measures what it says."""

import json
import time
from pathlib import Path

import pytest

from benchmarks.bench import Row, _peaks, _race, run_benchmark, write_json, write_plot
from benchmarks.cases import Task
from detpost.kernels.cpu import native


def test_a_race_gives_medians_and_ratios_to_detpost():
    contenders = {"detpost": lambda turn: time.sleep(0.005), "slow": lambda turn: time.sleep(0.03)}
    rows = {row.name: row for row in _race("task", (1,), contenders, seconds=0.2)}
    assert rows["detpost"].ratio == 1
    assert 1.5 < rows["slow"].ratio < 7  # of six, on a machine that may be busy
    assert rows["detpost"].microseconds > 4900


def test_one_task_alone_and_none_of_a_wrong_name():
    assert {row.task for row in run_benchmark(quick=True, only="distance_transform_edt")} == {"distance_transform_edt"}
    with pytest.raises(ValueError, match="no task 'decoding': take one of decode, Hausdorff"):
        run_benchmark(only="decoding")


def test_inputs_take_turns():
    seen = []
    _race("task", (1,), {"detpost": seen.append}, seconds=0.01)
    assert set(seen) == set(range(8))


@pytest.mark.slow
@pytest.mark.peers
def test_every_installed_peer_takes_part(tmp_path):
    rows = run_benchmark(quick=True)
    contenders = {row.name for row in rows if row.task == "decode"}
    assert {"detpost", "transformers", "kornia", "RT-DETR (in place)", "read of the logits"} <= contenders
    assert {row.name for row in rows if row.task.startswith("HausdorffDT")} == {"detpost", "detpost (aten)", "MONAI"}
    assert {row.name for row in rows if row.task == "distance_transform_edt"} == {"detpost", "scipy"}
    write_json(rows, tmp_path / "bench.json")
    write_plot(rows, tmp_path / "bench.png")
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][0]["task"] == "decode"
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_the_files_say_where_and_when(tmp_path):
    write_json([Row("decode", (1, 2, 3), "detpost", 5.0, 1.0)], tmp_path / "new" / "bench.json")
    said = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert said["versions"]["torch"]
    assert said["date"]
    row = {"task": "decode", "size": [1, 2, 3], "name": "detpost", "microseconds": 5.0, "ratio": 1.0}
    assert said["rows"] == [row | {"device": "cpu", "peak_bytes": None}]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")
def test_peak_memory_is_that_of_one_run():
    task = Task("HausdorffERLoss forward + backward", (2, 2, 256, 256), {}, with_memory=True)
    peaks = _peaks(task, "cpu")
    own, plain = peaks["detpost"], peaks["detpost (aten)"]
    field = 2 * 2 * 256 * 256 * 4
    assert plain > 10 * field  # every erosion is kept
    assert own < plain / 2 or native.missing() is not None
