"""Two artifacts compared: raw outputs by their bits, whole detectors by their detections."""

from detpost.verify.artifact import open_artifact
from detpost.verify.compare import VerifyReport, raw_cases, verify
from detpost.verify.matching import match_detections

__all__ = ["VerifyReport", "match_detections", "open_artifact", "raw_cases", "verify"]
