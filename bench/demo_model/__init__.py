"""How the bundled model of `reap-kernels demo` was trained and measured; not part of the wheel."""
