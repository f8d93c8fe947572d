"""`symphony report`: runs side by side on one HTML page. The quickstart's own markdown page is in `report.py`."""

from .find_runs import read_runs
from .page import write_page
from .runs import Run

__all__ = ["Run", "read_runs", "write_page"]
