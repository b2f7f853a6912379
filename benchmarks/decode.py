"""The decode: padded and to lists, sigmoid and softmax, warm and cold, with a gradient, and behind other names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.inputs import Case, Size, is_installed, no_grad, raw_outputs, with_kernel
from detpost import kernels
from detpost.kernels.cpu import decode as native
from detpost.postprocess import DetectionPostProcessor
from detpost.spec import DecodeSpec

__all__ = ["cold", "gradient", "padded", "softmax_lists", "to_lists", "trade_off"]

KEPT = 300
THRESHOLD = 0.5


def _forms(own: Case, device: str = "cpu") -> dict[str, Case]:
    forms = {"detpost": own, "detpost (aten)": with_kernel("aten", own)}
    return forms | ({"detpost (numpy)": with_kernel("numpy", own)} if device == "cpu" else {})


def padded(size: Size, device: str) -> dict[str, Case]:
    """Logits and boxes to padded tensors, without gradients."""
    logits, boxes, sizes = raw = raw_outputs(size, device)
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=KEPT)
    contenders = _forms(no_grad(lambda i: post(logits[i], boxes[i], sizes)), device)
    if device == "cuda":
        from detpost.export import CudaGraph

        graph = CudaGraph(post, (logits[0], boxes[0], sizes), clone=False)
        contenders |= {"detpost (CUDA graph)": no_grad(lambda i: graph(logits[i], boxes[i], sizes))}
        read = CudaGraph(_Read(), (logits[0],), clone=False)
        contenders |= {"read of the logits (CUDA graph)": no_grad(lambda i: read(logits[i]))}
    contenders |= peers.sigmoid_lists(size, raw, KEPT, 0.0)
    contenders |= {"read of the logits": no_grad(lambda i: logits[i].amax())}
    return contenders


class _Read(torch.nn.Module):
    """The floor: what any decode has to do at the least."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.amax()


def to_lists(size: Size, device: str) -> dict[str, Case]:
    """Raw outputs to a list of dicts, the threshold included: what a user reads."""
    raw = raw_outputs(size, device)
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=KEPT, score_threshold=THRESHOLD)
    return _to_lists(post, raw, device) | peers.sigmoid_lists(size, raw, KEPT, THRESHOLD)


def _to_lists(post: DetectionPostProcessor, raw: peers.Raw, device: str) -> dict[str, Case]:
    logits, boxes, sizes = raw
    contenders = _forms(no_grad(lambda i: post(logits[i], boxes[i], sizes).to_list()), device)
    return contenders | {"detpost (per_image)": no_grad(lambda i: post.per_image(logits[i], boxes[i], sizes))}


def softmax_lists(size: Size, device: str) -> dict[str, Case]:
    """As :func:`to_lists` for a softmax head, the best class of each query (preset ``detr``)."""
    logits, boxes, sizes = raw = raw_outputs(size, device)
    # Peaked as a trained head's: most queries are sure that they see nothing.
    peaked = [values * 2 + torch.nn.functional.one_hot(torch.tensor(size[2] - 1), size[2]) * 4 for values in logits]
    raw = (peaked, boxes, sizes)
    post = DetectionPostProcessor.from_preset("detr", score_threshold=0.1)
    return _to_lists(post, raw, device) | peers.detr_lists(raw, 0.1)


def gradient(size: Size, device: str) -> dict[str, Case]:
    """Forward and backward through the scores and the boxes."""
    logits, boxes, sizes = raw_outputs(size, device)
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=KEPT)

    def there_and_back(decode: Any) -> Case:
        def run(turn: int) -> Any:
            first, second = logits[turn].detach().requires_grad_(), boxes[turn].detach().requires_grad_()
            scores, corners = decode(first, second)
            (scores.sum() + corners.sum()).backward()
            return first.grad, second.grad

        return run

    def own(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        found = post(first, second, sizes)
        return found.scores, found.boxes

    contenders = {"detpost": there_and_back(own), "detpost (aten)": with_kernel("aten", there_and_back(own))}
    if is_installed("kornia"):
        from kornia.models.rt_detr.post_processor import DETRPostProcessor

        theirs = DETRPostProcessor(num_classes=size[2], num_top_queries=KEPT, confidence_filtering=False)

        def kornias(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            rows = theirs(first, second, sizes)
            rows = torch.stack(rows) if isinstance(rows, list) else rows
            return rows[..., 1], rows[..., 2:]

        contenders |= {"kornia": there_and_back(kornias)}
    return contenders


class After:
    """A case that other work runs before, outside the time that is taken."""

    def __init__(self, case: Case, is_cold: bool = False) -> None:
        self.case, self.is_cold = case, is_cold
        self._field = torch.rand(8, 16, 96, 96)
        self._weight = torch.rand(16, 16, 3, 3)

    def prepare(self) -> None:
        """Run a convolution, as a network would; cold, also touch more memory than the caches hold."""
        with torch.no_grad():
            torch.nn.functional.conv2d(self._field, self._weight).relu().sum()
            if self.is_cold:
                torch.rand(4_000_000).sort()

    def __call__(self, turn: int) -> Any:
        return self.case(turn)


def cold(size: Size, device: str) -> dict[str, Case]:
    """Give one image called in a loop, right after a network, and after work that leaves nothing in the caches."""
    logits, boxes, sizes = raw = raw_outputs(size, device)
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=KEPT)
    contenders = {"detpost": no_grad(lambda i: post(logits[i], boxes[i], sizes))}
    theirs = peers.sigmoid_lists(size, raw, KEPT, 0.0)
    contenders |= {name: case for name, case in theirs.items() if name != "RF-DETR"}
    contenders |= {"read of the logits": no_grad(lambda i: logits[i].amax())}
    for name, case in [*contenders.items()]:
        contenders |= {f"{name}, after a network": After(case), f"{name}, cold": After(case, is_cold=True)}
    if kernels.kernel_for(device) == "native":  # the same kernel, called in other ways
        contenders |= {
            "detpost (ctypes)": no_grad(lambda i: native.decode(logits[i], boxes[i], sizes, post.spec)),
            "detpost (operator)": no_grad(lambda i: native.decode_as_operator(logits[i], boxes[i], sizes, post.spec)),
        }
    return contenders


def trade_off(size: Size, device: str) -> dict[str, Case]:
    """Give the same decode written in place, out of place, and out of place and compiled."""
    logits, boxes, sizes = raw_outputs(size, device)
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=KEPT)
    compiled = torch.compile(DetectionPostProcessor.from_preset("rtdetr", top_k=KEPT), fullgraph=True)
    own = no_grad(lambda i: post(logits[i], boxes[i], sizes))
    contenders: dict[str, Case] = {
        "detpost": own,
        "out of place": with_kernel("aten", own),
        "out of place, compiled": with_kernel("aten", no_grad(lambda i: compiled(logits[i], boxes[i], sizes))),
    }
    if is_installed("tests.reference.rtdetr_inplace"):
        from tests.reference.rtdetr_inplace import decode_

        contenders |= {"in place": no_grad(lambda i: decode_(logits[i], boxes[i].clone(), sizes))}
    return contenders


def drop_in(library: str) -> Any:
    """Give the maker of a task: detpost's stand-in beside the call that it replaces, to lists; one image cold, too."""
    makers: dict[str, Callable[[Size, str], dict[str, Case]]] = {
        "transformers, sigmoid": _transformers_sigmoid,
        "transformers, softmax": _transformers_softmax,  # their own threshold, and one that keeps nearly all
        "transformers, softmax, low threshold": functools.partial(_transformers_softmax, threshold=0.05),
        "kornia": _kornia,
        "RT-DETR": _rtdetr,
        "RF-DETR": _rfdetr,
        "Ultralytics": _ultralytics,
    }
    make = makers[library]

    def warm_and_cold(size: Size, device: str) -> dict[str, Case]:
        contenders: dict[str, Case] = make(size, device)
        if size[0] > 1 or size[1] * size[2] > 300 * 80:
            return contenders
        return contenders | {f"{name}, cold": After(case, is_cold=True) for name, case in contenders.items()}

    return warm_and_cold


def _transformers_sigmoid(size: Size, device: str) -> dict[str, Case]:
    from detpost.integrations.transformers import post_process_object_detection

    logits, boxes, sizes = raw = raw_outputs(size, device)
    own = no_grad(
        lambda i: post_process_object_detection(
            peers.outputs_of(logits[i], boxes[i]), threshold=THRESHOLD, target_sizes=sizes, family="rt_detr"
        )
    )
    return {"detpost": own} | _only(peers.sigmoid_lists(size, raw, KEPT, THRESHOLD), "transformers")


def _transformers_softmax(size: Size, device: str, threshold: float = THRESHOLD) -> dict[str, Case]:
    from detpost.integrations.transformers import post_process_object_detection

    logits, boxes, sizes = raw = raw_outputs(size, device)
    own = no_grad(
        lambda i: post_process_object_detection(
            peers.outputs_of(logits[i], boxes[i]), threshold=threshold, target_sizes=sizes, family="detr"
        )
    )
    return {"detpost": own} | peers.detr_lists(raw, threshold)


def _kornia(size: Size, device: str) -> dict[str, Case]:
    from detpost.integrations.kornia import DETRPostProcessor

    logits, boxes, sizes = raw = raw_outputs(size, device)
    post = DETRPostProcessor(THRESHOLD, num_classes=size[2], num_top_queries=KEPT)
    own = no_grad(lambda i: post(logits[i], boxes[i], sizes))
    return {"detpost": own} | _only(peers.sigmoid_lists(size, raw, KEPT, THRESHOLD), "kornia")


def _rtdetr(size: Size, device: str) -> dict[str, Case]:
    from detpost.integrations.rtdetr import RTDETRPostProcessor

    logits, boxes, sizes = raw = raw_outputs(size, device)
    post = RTDETRPostProcessor(num_classes=size[2], num_top_queries=KEPT)
    swapped = sizes.flip(-1)
    contenders = {"detpost": no_grad(lambda i: post({"pred_logits": logits[i], "pred_boxes": boxes[i]}, swapped))}
    for name, case in _only(peers.sigmoid_lists(size, raw, KEPT, 0.0), "RT-DETR (in place)").items():
        contenders |= {name: lambda i, case=case: _dicts(*case(i))}  # type: ignore[misc]
    return contenders


def _dicts(labels: Tensor, boxes: Tensor, scores: Tensor) -> list[dict[str, Tensor]]:
    """Make RT-DETR's list, as its own post-processor does behind the decode."""
    images = zip(labels, boxes, scores, strict=True)
    return [{"labels": label, "boxes": box, "scores": score} for label, box, score in images]


def _rfdetr(size: Size, device: str) -> dict[str, Case]:
    from detpost.integrations.rfdetr import PostProcess

    logits, boxes, sizes = raw = raw_outputs(size, device)
    post = PostProcess(num_select=KEPT)
    own = no_grad(lambda i: post({"pred_logits": logits[i], "pred_boxes": boxes[i]}, target_sizes=sizes))
    return {"detpost": own} | _only(peers.sigmoid_lists(size, raw, KEPT, 0.0), "RF-DETR")


def _ultralytics(size: Size, device: str) -> dict[str, Case]:
    """Time what is behind the head: that of 8.4 selects by itself, that of 8.3, where it is installed, does not."""
    from detpost.integrations.ultralytics import postprocess, postprocess_selected

    logits, boxes, sizes = raw_outputs(size, device)
    own, heads = postprocess_selected, [_selected(*raw) for raw in zip(logits, boxes, strict=True)]
    contenders: dict[str, Case] = {}
    if is_installed("ultralytics"):
        from types import SimpleNamespace

        from ultralytics.models.rtdetr.predict import RTDETRPredictor
        from ultralytics.nn.modules.head import RTDETRDecoder

        if not hasattr(RTDETRDecoder, "postprocess"):
            own = postprocess
            heads = [torch.cat((box, values.sigmoid()), dim=-1) for values, box in zip(logits, boxes, strict=True)]
        predictor = object.__new__(RTDETRPredictor)
        names = {number: str(number) for number in range(size[2])}
        predictor.args = SimpleNamespace(conf=0.25, classes=None, max_det=300)
        predictor.model = SimpleNamespace(names=names)
        predictor.batch = [[""] * size[0]]
        images = [torch.zeros(480, 640, 3, dtype=torch.uint8).numpy()] * size[0]
        contenders = {"Ultralytics": no_grad(lambda i: predictor.postprocess(heads[i], torch.zeros(1), images))}
    return {"detpost": no_grad(lambda i: own(heads[i], sizes, conf=0.25))} | contenders


def _selected(logits: Tensor, boxes: Tensor) -> Tensor:
    """Give (B, K, 6), as the head of ultralytics 8.4: the best pairs of query and class, with their boxes."""
    found = DetectionPostProcessor(DecodeSpec(top_k=KEPT))(logits, boxes)
    chosen = boxes.gather(1, found.queries.unsqueeze(-1).expand(-1, -1, 4))
    return torch.cat((chosen, found.scores.unsqueeze(-1), found.labels.unsqueeze(-1)), dim=-1)


def _only(contenders: dict[str, Case], name: str) -> dict[str, Case]:
    return {key: case for key, case in contenders.items() if key == name}
