"""EVIDENCE.md: what was run, next to the paper's numbers, written from result files alone."""

from .page import evidence_page
from .results import add_results, read_results, write_evidence

__all__ = ["add_results", "evidence_page", "read_results", "write_evidence"]
