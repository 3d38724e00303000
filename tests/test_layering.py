"""The arrows of the house: reap_kernels -> reap_driver, and the order inside each, by imports."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS, DRIVER = ROOT / "reap_kernels", ROOT / "python" / "reap_driver"
BENCH = ROOT / "bench"

# Lowest first: a module may import from its own level or one before it.
KERNEL_ORDER = (
    ("errors", "requirements", "files", "schema", "documents", "provenance"),
    ("model_match", "tensor_files", "stats_values"),
    ("env", "activation", "quantized"),
    ("types",),
    ("dispatch", "stats", "layer_gram", "device", "testing", "scratch"),
    ("tuning", "selfcheck", "cuda"),
    ("sort", "dequant", "norm"),
    ("experts", "rotary"),
    ("saliency", "gram"),
    ("layer", "cross", "compare"),
    ("doctor", "tune", "__init__"),
)
DRIVER_ORDER = (
    ("base",),
    ("files",),
    ("compat",),
    ("model",),
    ("load",),
    ("fusing",),
    ("data",),
    ("planning",),
    ("interchange",),
    ("compensation",),
    ("memory",),
    ("observation",),
    ("refitting",),
    ("writer",),
    ("evaluation",),
    ("merging",),
    ("plan_search",),
    ("reporting",),
    ("workflow",),
    ("__init__",),
    ("demo", "cli", "integrations"),
    ("__main__",),
)
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 500, 50, 120  # as CONTRIBUTING.md states them
# Packages that decide from statistics alone: they use these packages and no other.
PURE = {"planning": ("planning", "base")}
# Modules and packages that can be imported only where the framework that they extend is installed.
HOSTED = (
    "reap_driver.integrations.llm_compressor",
    "reap_driver.integrations.vllm.engine",
    "reap_driver.integrations.vllm.server",
)
FORBIDDEN_IN_KERNELS = ("transformers", "accelerate", "datasets", "tokenizers", "reap_driver")


def needs_host(module: str) -> bool:
    """Whether a module is one of `HOSTED`, or lies in one."""
    return any(module == name or module.startswith(f"{name}.") for name in HOSTED)


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


def order_of(package: Path) -> dict[str, int]:
    """The level of each part of a package."""
    order = KERNEL_ORDER if package == KERNELS else DRIVER_ORDER
    return {part: rank for rank, parts in enumerate(order) for part in parts}


@pytest.mark.parametrize("package", [KERNELS, DRIVER], ids=lambda package: package.name)
def test_packages_point_down(package: Path) -> None:
    level = order_of(package)
    for path in sources(package):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        assert own in level, f"{own} has no place in the order of {package.name}"
        for name in imported(path):
            top, _, rest = name.partition(".")
            if top != package.name:
                continue
            part = rest.partition(".")[0]
            part = part if part in level else "__init__"  # a name of the package itself
            if rest:
                assert level[part] <= level[own], f"{path} imports {name} from above"


def test_kernels_know_tensors_only() -> None:
    for path in sources(KERNELS):
        for name in imported(path):
            assert name.split(".")[0] not in FORBIDDEN_IN_KERNELS, f"{path} imports {name}"


def test_no_file_adds_a_kind_of_error() -> None:
    """What derives from `ReapError` itself is listed in `reap_kernels.errors`; other files may only
    make a kind more specific.
    """
    found = {
        f"{path.relative_to(path.parents[2])}: {node.name}"
        for package in (KERNELS, DRIVER)
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and path != KERNELS / "errors.py"
        and any(ast.unparse(base).rpartition(".")[2] == "ReapError" for base in node.bases)
    }
    assert found == set()


def test_decisions_know_statistics_only() -> None:
    for package, allowed in PURE.items():
        for path in sources(DRIVER / package):
            for name in imported(path):
                top, _, rest = name.partition(".")
                assert top != "transformers", f"{path} imports {name}"
                assert top != "reap_driver" or rest.split(".")[0] in ("", *allowed), (
                    f"{path} imports {name}"
                )


def test_the_part_inside_vllm_knows_kernels_only() -> None:
    """It runs in every worker, so it needs neither transformers nor the rest of the driver."""
    own = "reap_driver.integrations.vllm.engine"
    allowed = {*sys.stdlib_module_names, "torch", "reap_kernels", "vllm"}
    paths = sources(DRIVER / "integrations/vllm/engine")
    assert len(paths) > 1
    for path in paths:
        for name in imported(path):
            assert name.startswith(own) or name.partition(".")[0] in allowed, (
                f"{path} imports {name}"
            )


def imports_within(package: Path) -> dict[str, set[str]]:
    """{module: modules of the package that it imports}, anywhere in it."""
    modules = {
        ".".join((package.name, *path.relative_to(package).with_suffix("").parts)): path
        for path in sources(package)
    }

    def module_of(name: str) -> str:
        """The module that has a dotted name, which may be that of something it defines."""
        while name and not {name, f"{name}.__init__"} & set(modules):
            name = name.rpartition(".")[0]
        return name if name in modules or not name else f"{name}.__init__"

    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[module] |= {module_of(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                graph[module] |= {module_of(f"{node.module}.{alias.name}") for alias in node.names}
        graph[module] -= {module, ""}
    return graph


@pytest.mark.parametrize("package", [KERNELS, DRIVER], ids=lambda package: package.name)
def test_no_files_import_each_other_in_a_circle(package: Path) -> None:
    circle: list[str] = []
    try:
        graphlib.TopologicalSorter(imports_within(package)).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
    assert not circle, f"circle of imports: {' -> '.join(circle)}"


def test_files_say_what_they_do_and_stay_short() -> None:
    for path in [*sources(KERNELS), *sources(DRIVER), *sources(ROOT / "bench")]:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path} does not say what it does"
        assert text.count("\n") <= FILE_LINES, f"{path} is over {FILE_LINES} lines"


@pytest.mark.parametrize("root", [KERNELS, DRIVER, BENCH], ids=lambda root: root.name)
def test_functions_stay_short(root: Path) -> None:
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                doc = ast.get_docstring(node, clean=False)
                length = node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
                kernel = path.name in ("kernel_triton.py", "kernel_tma.py", "kernel_fp8.py")
                limit = KERNEL_LINES if kernel else FUNCTION_LINES
                assert length <= limit, f"{path}: {node.name} has {length} lines"
