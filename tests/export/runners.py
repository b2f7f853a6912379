"""What runners make of the outputs that they are given: each written from that runner's own parser.

Every reader takes a file's outputs by name, in order, and gives the detections of the first image as the runner hands
them on: labels, scores, corners.
"""

from __future__ import annotations

import numpy as np


def deepstream(outputs, width, height, threshold):
    """DeepStream-Yolo's NvDsInferParseYolo: rows of the first output; corners are held to the network's input."""
    (rows,) = outputs.values()
    found = []
    thresholds = [threshold] * 1000
    for row in rows[0]:
        label = int(row[5])
        assert label >= 0, "the parser would read before its thresholds"
        if row[4] < thresholds[label]:
            continue
        x1, x2 = (min(max(value, 0), width) for value in (row[0], row[2]))
        y1, y2 = (min(max(value, 0), height) for value in (row[1], row[3]))
        if x2 - x1 < 1 or y2 - y1 < 1:
            continue
        found.append((label, row[4], (x1, y1, x2, y2)))
    return found


def ultralytics(outputs, width, height, threshold):
    """Ultralytics' non_max_suppression of end-to-end rows, and its scale_boxes where nothing was padded."""
    rows = next(iter(outputs.values()))
    assert rows.shape[-1] == 6
    kept = rows[0][rows[0][:, 4] > threshold][:300]
    return [(int(row[5]), row[4], tuple(row[:4])) for row in kept]


def frigate(outputs, width, height, threshold):
    """Frigate's post_process_dfine, without its own suppression: of detections that do not overlap it takes all."""
    labels, boxes, scores = outputs.values()
    class_ids, boxes, scores = (part[scores > threshold] for part in (labels, boxes, scores))
    boxes = np.divide(boxes, np.array([height, width, height, width]), dtype=np.float32)
    detections = np.zeros((20, 6), np.float32)
    for i, (box, score, label) in enumerate(zip(boxes[:20], scores, class_ids, strict=False)):
        detections[i] = [label, score, box[1], box[0], box[3], box[2]]  # y before x
    return [
        (int(label), score, (x1 * width, y1 * height, x2 * width, y2 * height))
        for label, score, y1, x1, y2, x2 in detections
        if score
    ]


def roboflow(outputs, width, height, threshold):
    """roboflow/inference's RFDETRObjectDetection.postprocess, images stretched to the network's input."""
    boxes, logits = outputs.values()
    z = np.exp(-np.abs(logits))
    scores = np.where(logits >= 0, 1 / (1 + z), z / (1 + z))[0].reshape(-1)
    order = np.argsort(-scores)[:300]
    order = order[scores[order] > threshold]
    rows, labels = order // logits.shape[2], order % logits.shape[2]
    centre, size = boxes[0, rows, :2], boxes[0, rows, 2:]
    corners = np.concatenate([centre - 0.5 * size, centre + 0.5 * size], axis=1) * [width, height, width, height]
    corners = np.clip(corners, 0, [width, height, width, height])
    return [(int(label), scores[place], tuple(box)) for label, place, box in zip(labels, order, corners, strict=True)]


def rtdetr(outputs, width, height, threshold):
    """RT-DETR's and D-FINE's onnx_inf.py: three outputs in order."""
    labels, boxes, scores = outputs.values()
    kept = scores[0] > threshold
    return list(zip(labels[0][kept].tolist(), scores[0][kept], map(tuple, boxes[0][kept]), strict=True))


def efficientnms(outputs, width, height, threshold):
    """TensorRT's samples on EfficientNMS: as many as num_dets says."""
    count = int(outputs["num_dets"][0, 0])
    rows = [outputs[name][0, :count] for name in ("det_classes", "det_scores", "det_boxes")]
    return [(int(label), score, tuple(box)) for label, score, box in zip(*rows, strict=True) if score > threshold]


RUNNERS = {
    "deepstream": deepstream,
    "ultralytics": ultralytics,
    "frigate": frigate,
    "roboflow": roboflow,
    "rtdetr": rtdetr,
    "efficientnms": efficientnms,
}
