"""Runs of detect that are killed at chosen moments, for test_detect: one process loads the model and forks each run.

    python killed_runs.py IMAGES OUT [tiles:SIZE] POINT...

A point is ``write:CALL:BYTES`` (die in the CALL-th write to the journal after BYTES of it, counted from its end
where negative), ``synced:CALL`` (after the write has reached the disk), ``replace:CALL`` (before the CALL-th result
file moves into place) or ``picture:CALL`` (before the CALL-th picture does). Each point runs in OUT/POINT until it
dies, then runs again to the end. Prints one JSON line per point: how it died, how many images were finished then, how
many images (tiles among them) went through the detector afterwards.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

import torchvision.transforms.v2.functional  # noqa: E402, F401

import detpost.runs.detect as subject  # noqa: E402
import detpost.runs.drawing  # noqa: E402, F401
import detpost.runs.pictures as pictures  # noqa: E402
import detpost.runs.results as results  # noqa: E402
from detpost.detector import Detector  # noqa: E402
from detpost.runs.journal import Journal  # noqa: E402
from detpost.runs.tiles import Tiling  # noqa: E402

OPTIONS = {
    "batch_size": 3,
    "formats": ("coco", "jsonl", "csv", "parquet"),
    "draw": True,
    "device": "cpu",
    "threshold": 0.3,
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point):
    """Put the death into place."""
    kind, call, *rest = point.split(":")
    calls = iter(range(1000))
    write, replace = Journal._write, os.replace

    def writing(journal, data):
        if next(calls) == int(call):
            if kind == "synced":
                write(journal, data)
                die()
            end = int(rest[0])
            journal._file.write(data[: len(data) + end if end < 0 else end])
            die()
        write(journal, data)

    def replacing(source, target):
        picture = Path(source).name.startswith(".part")
        if picture == (kind == "picture") and next(calls) == int(call):
            die()
        replace(source, target)

    if kind in ("write", "synced"):
        Journal._write = writing
    else:
        pictures.os.replace = results.os.replace = replacing


def forked(run):
    """Run in a child and give its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # makes the pool that a fork leaves behind anew, before several threads do at once
            run()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main(images, out, *points):
    detector = Detector.load("tiny", device="cpu", threshold=OPTIONS["threshold"])
    Detector.load = lambda *_, **__: detector
    predict = detector.predict_ready
    options = OPTIONS
    if points[0].startswith("tiles:"):
        first, *points = points
        options = {**OPTIONS, "tiling": Tiling(int(first.removeprefix("tiles:")))}
    for point in points:
        folder = Path(out) / point.replace(":", "_")

        def first(point=point, folder=folder):
            arm(point)
            subject.detect([images], folder, **options)

        def second(folder=folder):
            count = []

            def counting(batch, encode_masks=False):
                count.extend(batch)
                return predict(batch, encode_masks)

            detector.predict_ready = counting
            summary = subject.detect([images], folder, **options)
            (folder.parent / f"{folder.name}.json").write_text(json.dumps([len(count), summary.resumed]))

        died = 0 if point == "never:0" else forked(first)
        again = forked(second)
        through, resumed = json.loads((folder.parent / f"{folder.name}.json").read_text())
        print(json.dumps({"point": point, "died": died, "again": again, "through": through, "resumed": resumed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
