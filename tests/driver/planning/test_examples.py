"""The examples in docstrings of the plan package are correct."""

import doctest
import importlib
import pkgutil

import pytest
import reap_driver.plan

MODULES = [found.name for found in pkgutil.iter_modules(reap_driver.planning.__path__)]
EXAMPLES = ("criteria", "plan", "planner", "published", "scoring", "selection")


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"reap_driver.planning.{name}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_every_module_with_examples_is_tested() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = {name: importlib.import_module(f"reap_driver.planning.{name}") for name in MODULES}
    with_examples = {
        name
        for name, module in modules.items()
        if any(test.examples for test in finder.find(module, module.__name__))
    }
    assert with_examples == set(EXAMPLES)
