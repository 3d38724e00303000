"""The support matrix of docs/support.md, from what a test run recorded: never typed.

`REAP_SUPPORT_MATRIX=out/support.jsonl make test` records one JSON line a fact;
`python -m tests.support_matrix out/support.jsonl` rewrites the table in docs/support.md, and
with `--check` fails where that page differs from the run.
"""

import json
import sys
from pathlib import Path

from tests.interop.engines.table import in_matrix

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
BEGIN, END = "<!-- support -->\n", "<!-- end support -->"
COLUMNS = ("statistics", "end to end", "output", "checkpoint", "non-uniform", "streamed")
COLUMNS += ("left padding", "right padding")
# The last column: which engines ran it, by the table of engines in the same page.
ENGINES = "engines"
PUBLISHED = "published"


def read(path: Path) -> dict[str, dict[str, list[str]]]:
    """Architecture -> column -> outcomes."""
    facts: dict[str, dict[str, list[str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        fact = json.loads(line)
        outcomes = facts.setdefault(fact["architecture"], {}).setdefault(fact["column"], [])
        if fact["outcome"] not in outcomes:
            outcomes.append(fact["outcome"])
    return facts


def table(facts: dict[str, dict[str, list[str]]]) -> str:
    """One row per architecture; a dash where the run proved nothing."""
    published = sorted(name for columns in facts.values() for name in columns.get(PUBLISHED, ()))
    rows = {name: columns for name, columns in facts.items() if set(columns) & set(COLUMNS)}
    head = ["architecture", *COLUMNS, ENGINES]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in sorted(rows):
        cells = [", ".join(rows[name].get(column, ["-"])) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " | - |")
    complete = sum(all(column in rows[name] for column in COLUMNS[:6]) for name in rows)
    summary = (
        f"{complete} of {len(rows)} architectures pass all six; {len(published)} published "
        f"models (their configs at reduced width, in their own file layout) go from observation to "
        f"generation: {', '.join(published)}.\n\n"
    )
    return summary + "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Rewrites the page, or checks it."""
    check = "--check" in arguments
    paths = [Path(argument) for argument in arguments if not argument.startswith("-")]
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = in_matrix(before + BEGIN + table(read(paths[0])) + END + after)
    if check and wanted != text:
        print("docs/support.md: the support matrix is not what the tests proved; run: make support")
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
