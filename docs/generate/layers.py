"""The order of packages, as tests/test_layering.py holds it."""

import ast
from pathlib import Path

from tests import test_layering

ORDERS = {
    "kernels": ("KERNEL_ORDER", test_layering.KERNELS),
    "driver": ("DRIVER_ORDER", test_layering.DRIVER),
}


def render(package: str) -> str:
    """A table of levels, lowest first, with the first paragraph of each module.

    Args:
        package: `kernels` or `driver`.
    """
    order, folder = ORDERS[package]
    lines = ["| level | module | purpose |", "|---|---|---|"]
    for level, names in enumerate(getattr(test_layering, order), start=1):
        for name in (names,) if isinstance(names, str) else names:
            path, shown = _found(folder, name)
            lines.append(f"| {level} | `{shown}` | {_purpose(path)} |")
    return "\n".join(lines) + "\n"


def _found(folder: Path, name: str) -> tuple[Path, str]:
    """The file that describes a module, and what to call it."""
    if name == "__init__":
        return folder / "__init__.py", folder.name
    if (folder / name).is_dir():
        return folder / name / "__init__.py", f"{name}/"
    return folder / f"{name}.py", f"{name}.py"


def _purpose(path: Path) -> str:
    """The first paragraph of a file's docstring, as a cell of a table."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
