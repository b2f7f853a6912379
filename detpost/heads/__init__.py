"""What a detector predicts beside its boxes: instance masks, keypoints, oriented boxes.

Each head stands behind :class:`detpost.DetectionPostProcessor`: it takes the Detections and one more output of the
network, gathers that output's rows by query, and brings them to pixels of the original image. Slots that are not valid
read zero.
"""

from detpost.heads.keypoints import DETRPoseKeypoints, Keypoints, RFDETRKeypoints
from detpost.heads.masks import InstanceMasks, masks_per_image, to_rle
from detpost.heads.oriented import OrientedBoxes, OrientedDetections

__all__ = [
    "DETRPoseKeypoints",
    "InstanceMasks",
    "Keypoints",
    "OrientedBoxes",
    "OrientedDetections",
    "RFDETRKeypoints",
    "masks_per_image",
    "to_rle",
]
