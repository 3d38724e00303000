"""The arrows of the house: reap_kernels -> reap_driver, and the order inside each, by imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS, DRIVER = ROOT / "reap_kernels", ROOT / "python" / "reap_driver"

# Lowest first: a module may import from its own level or one before it.
KERNEL_ORDER = (
    ("errors", "files", "schema", "documents", "provenance"),
    ("model_match", "tensor_files", "stats_values"),
    ("env", "gates", "quantised"),
    ("types",),
    ("dispatch", "stats", "device", "testing", "scratch"),
    ("tuning", "selfcheck", "cuda"),
    ("route", "dequant"),
    ("experts",),
    ("saliency",),
    ("layer", "compare"),
    ("doctor", "tune", "__init__"),
)
DECISIONS = (
    "criteria",
    "own_criteria",
    "allocate",
    "plan",
    "planning",
    "unreached",
    "stability",
    "student",
)
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 500, 60, 120  # as CONTRIBUTING.md states them
FORBIDDEN_IN_KERNELS = ("transformers", "accelerate", "datasets", "tokenizers", "reap_driver")


def imported(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it, as absolute dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the package"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def sources(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py"))


@pytest.mark.parametrize("path", sources(KERNELS), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_point_down(path: Path) -> None:
    names = imported(path)
    for name in names:
        assert name.split(".")[0] not in FORBIDDEN_IN_KERNELS, f"{path} imports {name}"
    level = {part: rank for rank, parts in enumerate(KERNEL_ORDER) for part in parts}
    own = path.relative_to(KERNELS).parts[0].removesuffix(".py")
    assert own in level, f"{own} has no place in KERNEL_ORDER"
    for name in names:
        parts = name.split(".")
        if parts[0] == "reap_kernels" and len(parts) > 1 and parts[1] in level:
            assert level[parts[1]] <= level[own], f"{path} imports {name} from above"


def test_decisions_know_statistics_only() -> None:
    # `arguments` knows types of the public API, by name and when it is called.
    allowed = (
        "reap_kernels",
        "reap_driver.arguments",
        *(f"reap_driver.{name}" for name in DECISIONS),
    )
    for module in DECISIONS:
        for path in [*DRIVER.glob(f"{module}.py"), *sources(DRIVER / module)]:
            for name in imported(path):
                top = name.split(".")[0]
                if top in ("reap_driver", "reap_kernels"):
                    assert name.startswith(allowed), f"{path} imports {name}"
                assert top != "transformers", f"{path} imports {name}"


def test_the_writer_never_observes() -> None:
    for path in sources(DRIVER / "checkpoint"):
        for name in imported(path):
            assert not name.startswith("reap_driver.observe"), path


def test_files_say_what_they_do_and_stay_short() -> None:
    for path in [*sources(KERNELS), *sources(DRIVER), *sources(ROOT / "bench")]:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path} does not say what it does"
        assert text.count("\n") <= FILE_LINES, f"{path} is over {FILE_LINES} lines"


def test_functions_stay_short() -> None:
    for path in [*sources(KERNELS), *sources(DRIVER), *sources(ROOT / "bench")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                doc = ast.get_docstring(node, clean=False)
                length = node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
                limit = KERNEL_LINES if path.name == "kernel_triton.py" else FUNCTION_LINES
                assert length <= limit, f"{path}: {node.name} has {length} lines"
