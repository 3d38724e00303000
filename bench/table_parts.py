"""What tables are made of: the newest rows of results, and Markdown."""

import csv

from bench.rows import RESULTS

Row = dict[str, str]


def newest(name: str, *keys: str) -> list[Row]:
    """The newest row for each value of `keys`, in order of first appearance."""
    found: dict[tuple[str, ...], Row] = {}
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found[tuple(row[key] for key in keys)] = row
    return list(found.values())


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
