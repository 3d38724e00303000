"""The README's support matrix, from what a test run recorded: never typed.

`REAP_SUPPORT_MATRIX=out/support.jsonl make test` records one JSON line a fact;
`python -m tests.support_matrix out/support.jsonl` rewrites the table in README.md, and with
`--check` fails where the README differs from the run.
"""

import json
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- support -->\n", "<!-- end support -->"
COLUMNS = ("statistics", "end to end", "output", "checkpoint", "non-uniform", "streamed")
COLUMNS += ("left padding", "right padding")
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
    """One row an architecture; a dash where the run proved nothing."""
    published = sorted(name for columns in facts.values() for name in columns.get(PUBLISHED, ()))
    rows = {name: columns for name, columns in facts.items() if set(columns) & set(COLUMNS)}
    lines = ["| architecture | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in sorted(rows):
        cells = [", ".join(rows[name].get(column, ["-"])) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    complete = sum(all(column in rows[name] for column in COLUMNS[:6]) for name in rows)
    head = (
        f"{complete} of {len(rows)} architectures pass all six; {len(published)} published "
        f"models (their configs at reduced width, in their own file layout) go from observation to "
        f"generation: {', '.join(published)}.\n\n"
    )
    body = "\n".join(lines)
    return f"{head}<details><summary>All architectures</summary>\n\n{body}\n\n</details>\n"


def main(arguments: list[str]) -> int:
    """Rewrites the README, or checks it."""
    check = "--check" in arguments
    paths = [Path(argument) for argument in arguments if not argument.startswith("-")]
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = before + BEGIN + table(read(paths[0])) + END + after
    if check and wanted != text:
        print("README.md: the support matrix is not what the tests proved; run: make support")
        return 1
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
