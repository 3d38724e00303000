"""Routing: (token, slot) rows sorted by expert."""

from reap_kernels.route.op import route

__all__ = ["route"]
