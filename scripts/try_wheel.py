"""Try an installed wheel: its C++ kernels load, and give what PyTorch's own operators give.

    python scripts/try_wheel.py      # in an environment where the wheel is installed, from anywhere

Exit status 1 with one line where something is wrong. cibuildwheel runs it on each wheel that it has built.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

import detpost
from detpost import DecodeSpec, DetectionPostProcessor
from detpost.losses import distance_transform_edt, hausdorff_er_loss

ROOT = Path(__file__).resolve().parents[1]


def answers(kernel: str) -> list[torch.Tensor]:
    """Compute a decode with many ties, a distance transform and a loss with one form of the kernels."""
    os.environ["DETPOST_KERNEL"] = kernel
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-8, 8, (2, 300, 80), generator=generator) / 2
    boxes = torch.rand(2, 300, 4, generator=generator)
    found = DetectionPostProcessor(DecodeSpec())(logits, boxes, torch.tensor([[480, 640], [500, 333]]))
    mask = torch.rand(2, 1, 60, 70, generator=generator) < 0.9
    probabilities = torch.rand(2, 2, 30, 30, generator=generator)
    truth = torch.randint(2, (2, 1, 30, 30), generator=generator)
    return [*found, distance_transform_edt(mask), hausdorff_er_loss(probabilities, truth)]


def main() -> int:
    if Path(detpost.__file__).is_relative_to(ROOT):
        print(f"expected an installed detpost, got the checkout {detpost.__file__}: install the wheel", file=sys.stderr)
        return 1
    try:
        found = answers("native")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    wrong = [i for i, (a, b) in enumerate(zip(found, answers("aten"), strict=True)) if not torch.allclose(a, b)]
    if wrong:
        print(f"expected the same answers from both forms; answers {wrong} differ", file=sys.stderr)
        return 1
    del os.environ["DETPOST_KERNEL"]
    done = subprocess.run([sys.executable, "-m", "detpost", "doctor"], capture_output=True, text=True)
    print(f"detpost {detpost.__version__}, CPython {sys.version.split()[0]}: the C++ kernels give PyTorch's answers")
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
