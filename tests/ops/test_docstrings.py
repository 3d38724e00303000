"""Every exported name says how it is called, and its example runs as written."""

import doctest

import pytest

import reap_kernels as rk

NAMES = [name for name in rk.__all__ if name != "errors"]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_an_exported_name_runs(name: str) -> None:
    found = getattr(rk, name)
    assert "Example:" in found.__doc__, f"{name} has no example"
    examples = doctest.DocTestParser().get_doctest(found.__doc__, {}, name, None, 0)
    assert examples.examples, f"{name} has an empty example"
    runner = doctest.DocTestRunner(verbose=False)
    said: list[str] = []
    runner.run(examples, out=said.append)
    assert runner.failures == 0, "".join(said)
