"""`symphony report`: runs side by side on one HTML page. The quickstart's own markdown page is in `report.py`."""
