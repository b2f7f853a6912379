"""A detector whose raw outputs are given: which image it looks at is in the image's colour."""

import os
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from detpost.detector import Detector
from detpost.images import FixedSize, Preprocessing
from detpost.postprocess import DetectionPostProcessor
from detpost.spec import DecodeSpec

SPEC = DecodeSpec(top_k=12)
NAMES = {0: "cat", 1: "dog", 2: "größe"}


def give(folder, count, seed=0):
    """Make images of all sizes, each of one colour, and raw outputs with many ties; and some files that are broken."""
    random = np.random.default_rng(seed)
    images = folder / "images"
    for number in range(count):
        place = images / "abc"[number % 3] / f"{number:04}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        size = tuple(int(extent) for extent in random.integers(4, 60, 2))
        Image.new("RGB", size, (number % 256, number // 256, 0)).save(place)
    (images / "a" / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    (images / "b" / "empty.png").write_bytes(b"")
    logits = random.integers(-4, 4, (count, 10, 3)).astype(np.float32) / 2
    boxes = random.random((count, 10, 4), dtype=np.float32)
    np.savez(folder / "raw.npz", logits=logits, boxes=boxes)
    return images


class Maker:
    """Makes the detector, in whatever process.

    Args:
        folder: of :func:`give`.
        dies: names of files that are not there yet; the process that makes one dies at once, in the network for
            ``network`` and while preparing an image for ``decoding``.
    """

    def __init__(self, folder, dies=()):
        self.folder, self.dies = folder, tuple(dies)

    def __call__(self):
        raw = np.load(self.folder / "raw.npz")
        logits, boxes = torch.from_numpy(raw["logits"]), torch.from_numpy(raw["boxes"])
        post = DetectionPostProcessor(SPEC)

        def run(images, image_sizes, pixel_mask):
            which = (images[:, 0, 0, 0] + 256 * images[:, 1, 0, 0]).long()
            if "network" in self.dies and (which > 15).any():
                die_once(self.folder / "network")
            return post(logits[which], boxes[which], image_sizes)

        prepare = Prepare(Preprocessing(8, 8, scale=1.0), self.folder, self.dies)
        return Detector(run, prepare, NAMES, torch.device("cpu"), 0.5, spec=SPEC)


class Prepare(FixedSize):
    """A resize that may end its process."""

    def __init__(self, preprocessing, folder, dies):
        super().__init__(preprocessing)
        self.folder, self.dies = folder, dies

    def one(self, image):
        if "decoding" in self.dies and image.width % 7 == 0:
            die_once(self.folder / "decoding")
        return super().one(image)


def die_once(marker: Path):
    """End this process as a machine that loses its power does, unless that has happened before."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class GivenOutputs:
    """Raw outputs that hang on an image's own pixels, with many ties."""

    def __init__(self):
        random = np.random.default_rng(5)
        self.logits = torch.from_numpy(random.integers(-4, 4, (256, 10, 3)).astype(np.float32) / 2)
        self.boxes = torch.from_numpy(random.random((256, 10, 4), dtype=np.float32))
        self.post = DetectionPostProcessor(DecodeSpec(top_k=12))
        self.batches = []

    def __call__(self, images, image_sizes, pixel_mask):
        self.batches.append(len(images))
        which = images[:, 0, 0, 0].long()
        return self.post(self.logits[which], self.boxes[which], image_sizes)


def given_detector():
    """Make a detector of them."""
    outputs = GivenOutputs()
    prepare = FixedSize(Preprocessing(8, 8, scale=1.0))
    names = {0: "cat", 1: "dog", 2: "bird"}
    return Detector(outputs, prepare, names, torch.device("cpu"), 0.5, spec=outputs.post.spec)


def make_noise(folder, sizes=((90, 120), (40, 30), (64, 64), (65, 64), (200, 70), (50, 210), (31, 131))):
    """Make images of noise, each (height, width)."""
    random = np.random.default_rng(3)
    for number, (height, width) in enumerate(sizes):
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder
