"""Export a detector with detpost's post-processing inside, run it in ONNX Runtime, and print what it found.

python scripts/export_onnx.py                       # the tiny digit detector
python scripts/export_onnx.py PATH_OR_HUB_ID IMAGE  # a transformers detector
"""

import argparse
from pathlib import Path

import onnxruntime
import torch

from detpost.export import to_onnx
from detpost.images import Preprocessing, read_image
from detpost.zoo import sample_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny", help="tiny, a transformers directory or a hub id")
    parser.add_argument("image", nargs="?", type=Path, default=sample_images()[0])
    parser.add_argument("--out", type=Path, default=Path("detector.onnx"))
    arguments = parser.parse_args()

    written = to_onnx(arguments.model, arguments.out, progress=print)
    session = onnxruntime.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])

    # From here on there is no PyTorch model: resize, scale, and give the size of the original image.
    height, width = session.get_inputs()[0].shape[2:]
    images, image_sizes = Preprocessing(height, width)([read_image(arguments.image)])
    labels, boxes, scores, valid = session.run(None, {"images": images.numpy(), "image_sizes": image_sizes.numpy()})

    keep = valid[0] & (scores[0] > 0.5)
    for label, score, box in zip(labels[0][keep], scores[0][keep], torch.from_numpy(boxes[0][keep]), strict=True):
        print(f"label {label}  score {score:.3f}  box {[round(value, 1) for value in box.tolist()]}")


if __name__ == "__main__":
    main()
