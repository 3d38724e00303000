"""Benchmarks: ratios measured in one run and appended as rows to bench/results.

`python -m bench` lists them; `python -m bench NAME` runs one and appends its rows.
`pytest bench --benchmark-only` times single ops.
"""
