"""Statistics as the bytes of their file, in which they go from one process to another."""

import tempfile
from pathlib import Path

from reap_kernels import SaliencyStats


def bytes_of(stats: SaliencyStats) -> bytes:
    """The content of the file of statistics."""
    with tempfile.TemporaryDirectory(prefix="reap-") as folder:
        path = Path(folder, "stats.safetensors")
        stats.save(path)
        return path.read_bytes()


def stats_of(content: bytes) -> SaliencyStats:
    """The statistics of the content of a file.

    Raises:
        DataError: it is damaged, or of another version of the format.

    Example:
        >>> stats_of(bytes_of(stats)).groups == stats.groups
        True
    """
    with tempfile.TemporaryDirectory(prefix="reap-") as folder:
        path = Path(folder, "stats.safetensors")
        path.write_bytes(content)
        return SaliencyStats.load(path)
