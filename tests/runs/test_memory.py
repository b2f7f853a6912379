"""What a run holds at once is bounded, however large the images and however slow the network."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from detpost.images import FixedSize, Preprocessing
from detpost.runs.memory import Memory
from detpost.runs.reading import Reader

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")

# Peak beyond what loading the detector and one small batch takes, KiB.
PEAK = """
import sys
from pathlib import Path
from detpost.runs.detect import detect

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

detect(["small"], "warm", device="cpu")
before = peak()
summary = detect(["large"], "out", device="cpu", workers=4)
assert not summary.skipped, summary.skipped
print(peak() - before)
"""


@LINUX
@pytest.mark.slow
def test_large_images_take_no_more_than_the_bound(tmp_path):
    for folder in ("small", "large"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "small" / "a.png")
    Image.new("1", (13000, 13000), 1).save(tmp_path / "large" / "a.png")  # 20 KB, once 3 GB
    Image.new("L", (12000, 9000), 90).convert("RGB").save(tmp_path / "large" / "b.jpg")
    for name in ("c.png", "d.png"):
        Image.new("L", (9000, 9000), 90).save(tmp_path / "large" / name)
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 2**20


def test_no_more_is_decoded_at_once_than_there_is_room_for():
    memory = Memory(working=100)
    inside, most, started = [], [], threading.Barrier(4)

    def work(size):
        started.wait()
        with memory.working(size):
            inside.append(size)
            most.append(sum(inside))
            time.sleep(0.01)
            inside.remove(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in (60, 50, 40, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(most) == 4
    assert all(held <= 100 or held == 300 for held in most), "what is too large goes alone"


def test_reading_ahead_of_a_slow_network_is_two_batches_and_what_the_threads_hold(tmp_path, monkeypatch):
    batch, workers = 3, 2
    names = [f"{number:02}.png" for number in range(40)]
    for name in names:
        Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / name)
    memory = Memory()
    reader = Reader(tmp_path, FixedSize(Preprocessing(8, 8)), batch, 1000, workers, memory, None)
    read, given, ahead = [], 0, []
    plain = reader.read
    monkeypatch.setattr(reader, "read", lambda name: read.append(name) or plain(name))
    for loaded in reader.batches(names):
        given += len(loaded)
        time.sleep(0.02)  # the network; the threads have time to run away
        ahead.append(len(read) - given)
    assert given == len(read) == 40
    assert 0 < max(ahead) <= 2 * batch + workers
