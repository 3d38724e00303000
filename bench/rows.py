"""Result rows in bench/results/*.csv: figures, machine, and versions of the software."""

import csv
import datetime
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from reap_driver.base.processor import cpu_name

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def _git(*arguments: str) -> str | None:
    """The output of git; None if it fails, because of no git or no repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version(package: str) -> str:
    """Version of an installed package, or `absent`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def environment() -> dict[str, str]:
    """Commit, date, machine and versions: the first columns of every row."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    dirty = "unknown" if status is None else "yes" if status else "no"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _git("rev-parse", "--short=10", "HEAD") or "unknown",
        "dirty": dirty,
        "cpu": f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def write(
    name: str,
    rows: list[dict[str, object]],
    *,
    folder: Path = RESULTS,
    facts: dict[str, str] | None = None,
    echo: bool = True,
) -> Path:
    """Appends `rows` to NAME.csv in `folder` and prints them.

    The first row determines the file's columns. Where a run has more than the file, old rows leave
    them blank; rows that lack one of the file's are refused.

    Args:
        name: name of the file, without its suffix.
        rows: rows with the same columns.
        folder: created if it does not exist.
        facts: the first columns of every row; default `environment()`.
        echo: whether to print the rows.
    """
    path = folder / f"{name}.csv"
    shared = environment() if facts is None else facts
    full = [{**shared, **row} for row in rows]
    columns = list(full[0])
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            header, before = list(reader.fieldnames or ()), list(reader)
        if not set(header) <= set(columns):
            raise ValueError(f"{path} has columns {header}, this run has {columns}; rename one")
        if header != columns:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns, restval="")
                writer.writeheader()
                writer.writerows(before)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(full)
    for row in rows if echo else ():
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return path
