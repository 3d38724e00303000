"""Benchmarks: claims are ratios measured side by side in one run, written as rows of bench/results.

`python -m bench` lists them; `python -m bench NAME` runs one and appends its rows.
`pytest bench --benchmark-only` times the single ops.
"""
