"""The check that fails tests without an assertion, on tests with and without."""

import re
from pathlib import Path

import pytest

from tests.forks import forked

ROOT = Path(__file__).parent.parent
TESTS = """
import pytest
import torch

@pytest.fixture
def asserting():
    assert True

def check():
    pass

class TestFailed:
    def test_empty(self):
        pass

    @pytest.mark.parametrize("number", [0])
    def test_returns_early(self, number):
        if not number:
            return
        assert number

    def test_no_round_of_a_loop(self):
        for number in ():
            assert number

    def test_of_a_fixture_only(self, asserting):
        check()

class TestPassed:
    def test_assert(self, asserting):
        assert 1 + 1 == 2
        assert 2 + 2 == 4

    def test_assert_again(self):
        assert 1 + 1 == 2

    def test_raises(self):
        with pytest.raises(ZeroDivisionError):
            1 / 0

    def test_assert_close(self):
        torch.testing.assert_close(torch.ones(1), torch.ones(1))

    @pytest.mark.does_not_raise
    def test_marked(self):
        check()

def test_that_fails_keeps_its_reason():
    raise ValueError("its own")

def test_that_is_skipped():
    pytest.skip("for a reason")
"""


def test_tests_that_assert_nothing_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fork: a run of pytest of its own."""
    (tmp_path / "test_some.py").write_text(TESTS)
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    options = ["-rA", "-p", "tests.assertions", *settings, str(tmp_path)]
    monkeypatch.setenv("PYTEST_ADDOPTS", "")
    done = forked(lambda: pytest.main(options))
    lines = re.findall(r"^(PASSED|FAILED) \S*test_some\.py::(\S+)", done.out, re.MULTILINE)
    failed = [name for outcome, name in lines if outcome == "FAILED"]
    passed = [name for outcome, name in lines if outcome == "PASSED"]
    assert failed == [
        "TestFailed::test_empty",
        "TestFailed::test_returns_early[0]",
        "TestFailed::test_no_round_of_a_loop",
        "TestFailed::test_of_a_fixture_only",
        "test_that_fails_keeps_its_reason",
    ], done.out + done.err
    assert len(passed) == 5
    assert all(name.startswith("TestPassed::") for name in passed)
    assert len(re.findall("^test_some.* an assertion that ran;", done.out, re.MULTILINE)) == 4
    assert "ValueError: its own" in done.out
    assert "1 skipped" in done.out
