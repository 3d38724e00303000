"""Which format a file is of, where its content says so; a guess is never taken."""

from pathlib import Path

from reap_driver.interchange.formats import FORMATS
from reap_kernels.documents import open_file, parse_json, read_bytes
from reap_kernels.errors import DataError

# How files of `torch.save` begin: a zip archive, or, as older ones, a pickle.
_TORCH = (b"PK\x03\x04", b"\x80")
_TORCH_FORMAT = "reap-reference"  # the one format of the table that is such a file


def known_formats(path: Path) -> list[str]:
    """Names of the formats that a file can be of, by its content: none where that does not say.

    Args:
        path: of the file.

    Raises:
        DataError: it cannot be read.

    Example:
        >>> known_formats(Path("plan.json")), known_formats(Path("stats.safetensors"))
        (['plan'], ['stats'])
    """
    try:
        with open_file(path) as file:
            head = file.read(9)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); give another file"
        ) from error
    if head[8:9] == b"{" and head[6:8] == b"\0\0":  # the length of a header, then JSON
        return ["stats"]
    if head.startswith(_TORCH):
        return [_TORCH_FORMAT]
    return _by_keys(path)


def _by_keys(path: Path) -> list[str]:
    """The formats whose names a JSON object has."""
    try:
        content = parse_json(read_bytes(path), plain=False)
    except ValueError:  # the reader of the format that is given says what is wrong with it
        return []
    if not isinstance(content, dict):
        return []
    if content.get("format") == "reap-plan":
        return ["plan"]
    return [one.name for one in FORMATS.values() if one.keys and one.keys <= content.keys()]
