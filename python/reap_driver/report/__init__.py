"""The report: one HTML page, and its pictures as PNG files, of statistics and perhaps a plan."""

from reap_driver.report.comparison import read_comparison
from reap_driver.report.page import write_report

__all__ = ["read_comparison", "write_report"]
