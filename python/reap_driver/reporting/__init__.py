"""The report: one HTML page, and its pictures as PNG files, of statistics and perhaps a plan."""
