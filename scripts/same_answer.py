"""Does every runtime choose the same detections? The decode of detpost, and a plain ``torch.topk`` decode beside it.

Runs the raw outputs that provoke every disagreement known through each runtime and counts the slots (label, query,
validity) that differ from eager PyTorch on the CPU. Of files in fewer bits the raw outputs pass through a layer in
these bits first, which makes many of them equal; eager PyTorch decodes what the layer gives.

    python scripts/same_answer.py              # the table of the README
    python scripts/same_answer.py --json FILE
"""

import argparse
import base64
import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from detpost import DetectionPostProcessor, Detections
from detpost.detections import INVALID
from detpost.export import CudaGraph, compile, to_onnx
from detpost.export.formats import FORMATS, Format
from detpost.export.graph import import_onnx
from detpost.export.lowering import PRECISIONS, Precision, calibrate, lower, prepared
from detpost.reference.decode import Steps, decode
from detpost.verify.compare import raw_cases
from detpost.web import write_site

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.browser import RUNTIME, SOFTWARE_GPU, browsing, missing, serving

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Detections]


class PlainTopK(DetectionPostProcessor):
    """The same decode with equal scores left to ``torch.topk``."""

    def forward(self, logits: torch.Tensor, boxes: torch.Tensor, image_sizes: torch.Tensor | None = None) -> Detections:
        """Decode by a selection as any program has it."""
        plain = Steps(select=lambda rows, k: rows.topk(min(k, rows.shape[1])).indices)
        return decode(logits, boxes, image_sizes, self.spec, plain)


# More than eight scores per kept one, so that the group prefilters take part.
QUERIES, CLASSES = 300, 20


# The page's own package, in a page of its own; what is decoded goes there and back as text.
_LOAD = """async (file, backend) => {
  const { load } = await import("./src/index.js");
  const ort = await import(`./ort/ort.${backend}.min.mjs`);
  ort.env.wasm.wasmPaths = new URL("ort/", location.href).href;
  const adapter = backend === "webgpu" && (await navigator.gpu?.requestAdapter());
  if (backend === "webgpu" && !adapter) return null;
  globalThis.detector = await load(file, { backend, runtime: async () => ort });
  return adapter ? adapter.info.architecture || adapter.info.vendor : "";
}"""
_DECODE = """async (logits, boxes, sizes) => {
  const tensor = ([dims, text]) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return { type: "float32", dims, data: new Float32Array(bytes.buffer) };
  };
  const images = await detector.decode(tensor(logits), tensor(boxes), sizes);
  return images.map((found) => found.map(({ score, label, box, query }) => [score, label, query, ...box]));
}"""


@contextlib.contextmanager
def in_browser(file: Path, backend: str, kept: int) -> Iterator[tuple[str, Run] | None]:
    """Open a file in the page that `detpost web` writes, in headless Chromium.

    Args:
        file: a post-processor alone, with queries.
        backend: ``"wasm"`` or ``"webgpu"``.
        kept: slots that the file gives.

    Yields:
        The name of the graphics processor, empty without, and what decodes; ``None`` where the browser has none.
    """
    site = write_site(file, file.parent / f"site-{backend}", runtime=RUNTIME).folder
    with serving(site) as address, browsing(SOFTWARE_GPU if backend == "webgpu" else ()) as browser:
        browser.open(f"{address}disk.js")  # a page of this address on which nothing else runs
        adapter = browser.run(_LOAD.replace("./", address), file.name, backend)

        def run(logits: torch.Tensor, boxes: torch.Tensor, sizes: torch.Tensor) -> Detections:
            sent = ([[*each.shape], base64.b64encode(each.numpy().tobytes()).decode()] for each in (logits, boxes))
            found = browser.run(_DECODE, *sent, sizes.tolist())
            empty = [INVALID.score, INVALID.label, INVALID.query, *[INVALID.box] * 4]
            rows = torch.tensor([[*image, *[empty] * (kept - len(image))] for image in found], dtype=torch.float64)
            valid = torch.tensor([[slot < len(image) for slot in range(kept)] for image in found])
            labels, queries = (rows[..., column].to(torch.int64) for column in (1, 2))
            return Detections(rows[..., 0].float(), labels, rows[..., 3:].float(), queries, valid)

        yield None if adapter is None else (adapter, run)


def runtimes(
    post: DetectionPostProcessor, folder: Path, ties: str, cuda: bool, browser: bool = False
) -> Iterator[tuple[str, Run]]:
    """Give each runtime that this machine has: a name, and raw outputs to detections on the CPU."""
    example = (torch.zeros(2, QUERIES, CLASSES), torch.zeros(2, QUERIES, 4), torch.ones(2, 2, dtype=torch.int64))
    yield "eager CPU", post
    yield "torch.compile (Inductor)", compile(post)
    yield "torch.export", torch.export.export(post, example, dynamic_shapes=_free_batch()).module()
    for entry in FORMATS:
        yield entry.runtime, _of_file(entry, post, folder / f"post{entry.ending}", ties)
    for precision in PRECISIONS:
        file = in_fewer_bits(post, precision, folder / f"{precision}.onnx", ties)
        for entry in (entry for entry in FORMATS if entry.name in ("onnx", "openvino")):
            yield f"{entry.runtime}, {precision} file", FewerBits(entry, file, precision)
    if browser:
        spec = post.spec
        kept = min(spec.top_k, QUERIES * CLASSES if spec.selection == "flat" else QUERIES)
        for backend, name in (("wasm", "Chromium, WebAssembly"), ("webgpu", "Chromium, WebGPU")):
            with in_browser(folder / "post.onnx", backend, kept) as found:
                if found is not None:
                    yield f"{name} ({found[0]})" if found[0] else name, found[1]
    if cuda:
        on_gpu = _on_cuda(post)
        yield "eager CUDA", on_gpu
        yield "torch.compile CUDA", _on_cuda(compile(post))
        yield "CudaGraph", _on_cuda(CudaGraph(post, tuple(value.cuda() for value in example)))


class FewerBits:
    """A file of detpost's with a layer in fewer bits before the decode.

    Args:
        entry: the format to run it as.
        file: of :func:`in_fewer_bits`.
        precision: of the layer.
    """

    def __init__(self, entry: Format, file: Path, precision: Precision) -> None:
        # On a CPU both runtimes compute half layers in float32 and leave the rounding of what goes in out.
        self.rounded = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        path = file.with_suffix(entry.ending)
        if path != file:
            entry.write()(model=file, path=path)
        self.opened = entry.open()(path, None)

    def __call__(self, logits: torch.Tensor, boxes: torch.Tensor, sizes: torch.Tensor) -> Detections:
        """Decode what the layer makes of raw outputs."""
        values = self._run(logits, boxes, sizes)
        return Detections(*(values[name] for name in Detections._fields))

    def raw(self, logits: torch.Tensor, boxes: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give what the file decodes when it is given raw outputs."""
        values = self._run(logits, boxes, sizes)
        return values["raw/pred_logits"], values["raw/pred_boxes"], sizes

    def _run(self, *raw: torch.Tensor) -> dict[str, torch.Tensor]:
        logits, boxes = (value.to(self.rounded).float() for value in raw[:2])
        return self.opened.run({"pred_logits": logits, "pred_boxes": boxes, "image_sizes": raw[2]})


def differing(run: Run, reference: DetectionPostProcessor) -> tuple[int, int]:
    """Count the slots in which ``run`` chooses otherwise than ``reference``, of how many."""
    wrong = total = 0
    for _, raw in raw_cases(QUERIES, CLASSES):
        expected, found = reference(*(run.raw(*raw) if isinstance(run, FewerBits) else raw)), run(*raw)
        same = torch.stack([getattr(found, part) == getattr(expected, part) for part in ("labels", "queries", "valid")])
        wrong, total = wrong + int((~same.all(dim=0)).sum()), total + same[0].numel()
    return wrong, total


def measure(preset: str) -> dict[str, dict[str, float]]:
    """Give, for each runtime, the share of slots that agree with eager CPU: detpost's decode, and with plain top-k."""
    rows: dict[str, dict[str, float]] = {}
    for ties, kind in (("exact", DetectionPostProcessor), ("onnx", PlainTopK)):
        exact = DetectionPostProcessor.from_preset(preset)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            there = {"cuda": torch.cuda.is_available(), "browser": missing() is None}
            for name, run in runtimes(kind(exact.spec), Path(folder), ties, **there):
                wrong, total = differing(run, exact)
                rows.setdefault(name, {})[ties] = 1 - wrong / total
    return rows


def _free_batch() -> tuple[dict[int, object], ...]:
    batch = torch.export.Dim("batch", min=1, max=64)
    return ({0: batch}, {0: batch}, {0: batch})


def _of_file(entry: Format, post: DetectionPostProcessor, path: Path, ties: str) -> Run:
    """Write a file of a format and open it."""
    options = {name: value for name, value in {"queries": True, "ties": ties}.items() if name not in entry.takes_no}
    # What has a choice of ties is written by it; what has none is the module itself, traced.
    model = DetectionPostProcessor(post.spec) if "ties" in options else post
    entry.write()(model=model, path=path, num_queries=QUERIES, num_classes=CLASSES, **options)
    opened = entry.open()(path, None)

    def run(*raw: torch.Tensor) -> Detections:
        values = opened.run(dict(zip(("pred_logits", "pred_boxes", "image_sizes"), raw, strict=True)))
        return Detections(*(values[name] for name in Detections._fields))

    return run


def in_fewer_bits(post: DetectionPostProcessor, precision: Precision, path: Path, ties: str) -> Path:
    """Write a file that puts raw outputs through a layer in fewer bits, gives them and decodes them.

    The layer multiplies by one, query by query, so that infinities stay where they are; behind it stands an addition,
    as a head ends in one: what the decode reads is float32 in every precision.
    """
    onnx = import_onnx()
    spec = DetectionPostProcessor(post.spec)
    to_onnx(spec, path, num_queries=QUERIES, num_classes=CLASSES, queries=True, ties=ties)
    model = onnx.load(path)
    arrays = {"one": np.ones((QUERIES, 1, 1), np.float32), "none": np.zeros(1, np.float32)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    front = []
    for name in ("pred_logits", "pred_boxes"):
        for node in model.graph.node:
            node.input[:] = [f"raw/{name}" if each == name else each for each in node.input]
        front += [
            onnx.helper.make_node("Conv", [name, "one"], [f"layer/{name}"], f"layer/{name}", group=QUERIES),
            onnx.helper.make_node("Add", [f"layer/{name}", "none"], [f"raw/{name}"], f"raw/{name}"),
        ]
        shape = ["batch", QUERIES, CLASSES if name == "pred_logits" else 4]
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"raw/{name}", onnx.TensorProto.FLOAT, shape))
    nodes = [*front, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model = prepared(model)
    seen = next(raw for name, raw in raw_cases(QUERIES, CLASSES) if name == "random, batch 8")
    feed = dict(zip(("pred_logits", "pred_boxes", "image_sizes"), (value.numpy() for value in seen), strict=True))
    onnx.save(lower(model, precision, ranges=calibrate(model, [feed])), path)
    return path


def _on_cuda(run: Callable[..., Detections]) -> Run:
    return lambda *raw: Detections(*(value.cpu() for value in run(*(value.cuda() for value in raw))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="rtdetr")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = measure(arguments.preset)
    table = Table(
        "runtime", "detpost", "plain torch.topk; of files, --ties onnx", title="slots that agree with eager CPU"
    )
    for name, shares in rows.items():
        table.add_row(name, f"{shares['exact']:.2%}", f"{shares['onnx']:.2%}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
