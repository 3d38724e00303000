"""Packages reap_kernels (top level) and reap_driver (under python/) as one distribution.

Everything declarative stands in pyproject.toml; this file holds what it cannot: two package roots,
and the version read from the source without importing torch.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "reap_kernels/__init__.py").read_text(), re.MULTILINE
)
assert VERSION, "reap_kernels/__init__.py states no __version__"

setup(
    version=VERSION[1],
    packages=[
        *find_packages(".", include=["reap_kernels", "reap_kernels.*"]),
        *find_packages("python", include=["reap_driver", "reap_driver.*"]),
    ],
    package_dir={"reap_kernels": "reap_kernels", "reap_driver": "python/reap_driver"},
    package_data={
        "reap_kernels": ["py.typed", "configs/*.json"],
        "reap_driver": ["py.typed", "demo/model/*"],
    },
)
