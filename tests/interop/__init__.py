"""Tests against packages of others, each in an environment of its own: `make test-interop`."""
