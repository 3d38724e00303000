"""Fixtures that the tests of all engines share."""

from tests.interop.engines.fixtures import compare, pairs  # noqa: F401
