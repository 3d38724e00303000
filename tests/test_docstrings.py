"""Every name that is exported has a docstring with an example, and the example runs."""

import doctest
import inspect
import pkgutil
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import reap_driver as rd
import reap_kernels as rk
from docs.generate import api
from tests.test_layering import needs_host

ROOT = Path(__file__).parent.parent
EXPORTED = [
    (package, name) for package in ("reap_kernels", "reap_driver") for name in api.exported(package)
]


class Checker(doctest.OutputChecker):
    """Compares what an example prints where it says so; an example may leave its output out."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """What examples name: the bundled model, a little text, statistics and a plan."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(ROOT / "python/reap_driver/demo/model", folder / "MODEL")
    lines = [f'{{"text": "def add_{i}(a, b):\\n    return a + b + {i}\\n"}}' for i in range(100)]
    (folder / "code.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def names(files: Path) -> dict[str, Any]:
    """Names that examples use without making them."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 1000, (1, 64), generator=generator)} for _ in "abcd"]
    model = rd.load_model(files / "MODEL")
    with rd.observe(model, gram=True) as observer:
        for batch in batches:
            observer(**batch)
    stats = observer.stats
    scores = rd.score(stats, "reap")
    plan = rd.make_plan(scores, ratio=0.25)
    stats.save(files / "stats.safetensors")
    plan.save(files / "plan.json")
    known = {"model": model, "batches": batches, "batch": batches[0], "stats": stats}
    known["grams"] = observer.grams
    known |= {"scores": scores, "plan": plan, "ids": batches[0]["input_ids"]}
    known["smaller"] = rd.make_plan(scores, ratio=0.5)
    rd.apply_plan(files / "MODEL", known["smaller"], files / "CUT")
    return {"rd": rd, "rk": rk, "torch": torch, **known}


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(("package", "name"), EXPORTED)
def test_examples_run(package, name, files, names, monkeypatch, capsys) -> None:
    text = inspect.getdoc(getattr(import_module(package), name)) or ""
    assert re.search(r"^Example:\n +>>> ", text, re.MULTILINE), f"{package}.{name} has no example"
    monkeypatch.chdir(files)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    test = doctest.DocTestParser().get_doctest(text, dict(names), f"{package}.{name}", None, 0)
    runner = doctest.DocTestRunner(Checker(), optionflags=flags)
    said: list[str] = []
    runner.run(test, out=said.append)
    assert runner.tries
    assert not runner.failures, "\n".join(said)


def inner_examples() -> list[doctest.DocTest]:
    """Examples in docstrings of what the driver does not export: they use names of their module."""
    found = []
    homes = set(api.exported("reap_driver").values())
    for module in pkgutil.walk_packages(rd.__path__, "reap_driver."):
        if module.name == "reap_driver.__main__" or needs_host(module.name):
            continue
        if module.name.endswith("load_pruned"):
            continue
        tests = doctest.DocTestFinder().find(import_module(module.name))
        own = [test for test in tests if test.examples]
        found += [t for t in own if not any(f"{t.name}.".startswith(f"{h}.") for h in homes)]
    return found


def test_examples_of_inner_names_run(files, names, monkeypatch) -> None:
    monkeypatch.chdir(files)
    tests = inner_examples()
    assert tests
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    runner = doctest.DocTestRunner(Checker(), optionflags=flags)
    said: list[str] = []
    for test in tests:
        test.globs = {**names, **test.globs}
        runner.run(test, out=said.append)
    assert not runner.failures, "\n".join(said)
