"""The conformance suite: does someone else's decode give detpost's answer, and where not, what does it do instead?"""

from detpost.verify.conformance.report import ConformReport, conform

__all__ = ["ConformReport", "conform"]
