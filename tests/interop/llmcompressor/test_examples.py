"""The examples in the docstrings of the integration run where llm-compressor is."""

import doctest

import pytest

from reap_driver.integrations import llm_compressor


def test_examples_run(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a modifier makes the folder of its report
    result = doctest.testmod(llm_compressor)
    assert result.attempted > 3
    assert result.failed == 0
