"""The report: one HTML page, and its pictures as PNG files, of statistics and perhaps a plan."""

from reap_driver.report.page import write_report

__all__ = ["write_report"]
