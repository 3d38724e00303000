"""The report: statistics, and optionally a plan, as one HTML page and PNG pictures."""
