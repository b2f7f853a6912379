"""How far the resize of ``preprocess_inside="full"`` lies from PIL's and torchvision's, on photographs.

Differences are of pixels of 0..255 after rounding: the greatest, the mean, and the share that differ by more than 1.
The photographs are those that scikit-learn and matplotlib ship. docs/deployment.md sums the table up.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as vision

SIZES = ((640, 640), (300, 300), (1024, 1024))


def photographs() -> dict[str, Image.Image]:
    """Open the photographs that come with libraries of the dev extra."""
    import matplotlib
    import sklearn

    found = [
        Path(sklearn.__file__).parent / "datasets/images/china.jpg",
        Path(sklearn.__file__).parent / "datasets/images/flower.jpg",
        Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg",
    ]
    return {path.stem: Image.open(path).convert("RGB") for path in found}


def by_graph(pixels: np.ndarray, size: tuple[int, int], antialias: bool) -> np.ndarray:
    """Resize (3, H, W) as the file does, in ONNX Runtime."""
    import onnxruntime
    from onnx import TensorProto, helper

    from detpost.export.front_graph import stretched
    from detpost.export.graph import Graph

    g = Graph(18, "resize/")
    value = stretched(g, "images", size, antialias)
    graph = helper.make_graph(
        g.nodes,
        "resize",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 3, "h", "w"])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)],
        g.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": pixels[None]})[0][0]


def main() -> None:
    """Print the table."""
    print(
        "| photograph | to | the file against | greatest | mean | more than 1 |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, image in photographs().items():
        pixels = np.asarray(image).transpose(2, 0, 1)
        tensor = torch.from_numpy(pixels.copy())
        for height, width in SIZES:
            ours = by_graph(pixels, (height, width), antialias=True)
            plain = by_graph(pixels, (height, width), antialias=False)
            pil = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            tv = vision.resize(tensor, [height, width], antialias=True).numpy()
            without = vision.resize(tensor, [height, width], antialias=False).numpy()
            rows = {
                "PIL": (ours, pil),
                "torchvision": (ours, tv),
                "torchvision, both without antialiasing": (plain, without),
                "(torchvision without against with)": (without, tv),
            }
            for other, (one, two) in rows.items():
                gap = np.abs(one.astype(np.float64) - two.astype(np.float64))
                share = f"{100 * (gap > 1).mean():.2g} %"
                print(f"| {name} {pixels.shape[1]}x{pixels.shape[2]} | {height}x{width} | {other} "
                      f"| {gap.max():.0f} | {gap.mean():.3f} | {share} |")  # fmt: skip


if __name__ == "__main__":
    main()
