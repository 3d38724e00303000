"""This project's entry points without installing it: a folder for PYTHONPATH."""

import tomllib
from pathlib import Path

import reap_kernels

ROOT = Path(__file__).parents[3]


def write_metadata(folder: Path) -> Path:
    """Writes into `folder` what pip would have written of pyproject.toml; returns it.

    `importlib.metadata` looks for it in every folder of `sys.path`.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, version = project["name"].replace("-", "_"), reap_kernels.__version__
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{point} = {place}" for point, place in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder
