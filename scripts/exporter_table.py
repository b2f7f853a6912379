"""Which of PyTorch's two ONNX exporters takes which family of the presets, with a free batch size?

Each transformers family, small and with random weights, goes through both; what comes out is run in ONNX Runtime at two
batch sizes and held to PyTorch, as every export is.

    python scripts/exporter_table.py                  # all, as a Markdown table
    python scripts/exporter_table.py rt_detr detr     # some
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

import onnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from detpost.export import to_onnx
from tests.detectors import FAMILIES, SEGMENTATION_FAMILIES, SIDE, detector

EXPORTERS = ("dynamo", "torchscript")


def tried(family: str, exporter: str) -> str:
    """Export one family with one exporter and say how it went, as a cell of the table."""
    model = detector(family)
    masks = "network" if family in SEGMENTATION_FAMILIES else None
    with tempfile.TemporaryDirectory() as folder:
        try:
            written = to_onnx(
                model, Path(folder) / "model.onnx", image_size=(SIDE, SIDE), masks=masks, exporter=exporter
            )
        except ValueError as error:
            return f"no: {reason_of(str(error), exporter)}"
        graph = onnx.load(written.path, load_external_data=False).graph
        network = sum(not node.name.startswith("detpost/") for node in graph.node)
    return f"yes, {network} nodes"


def reason_of(message: str, exporter: str) -> str:
    """Shorten an error to what it says of the exporter, without addresses and pipes."""
    text = message.split(f"the {exporter} exporter failed: ")[-1]
    return re.sub(r"\s+", " ", text.replace("|", "/"))[:130]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    arguments = parser.parse_args()
    known = {**FAMILIES, **SEGMENTATION_FAMILIES}
    unknown = [family for family in arguments.families if family not in known]
    if unknown:
        parser.error(f"no family {unknown[0]}: take of {', '.join(known)}")
    print("| family | newer exporter (`dynamo`) | older exporter (`torchscript`) |")
    print("| --- | --- | --- |", flush=True)
    for family in arguments.families or known:
        cells = [tried(family, exporter) for exporter in EXPORTERS]
        print(f"| `{family}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
