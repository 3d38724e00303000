"""Our own files of tensors: a safetensors file with a head of a known format in its metadata.

The head of a sealed format holds a digest over itself, names, dtypes, shapes and bytes of all
tensors, so one bit that changed anywhere is noticed.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reap_kernels.documents import Format, open_file
from reap_kernels.files import save_tensors


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    form: Format,
    content: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes a file at once under its name; see `reap_kernels.files.replaced`.

    Args:
        tensors: on any device.
        path: of the file.
        form: its format; the metadata has its name as the only key.
        content: the fields of the format.

    Returns:
        The head of the file, with its digest where the format is sealed.

    Raises:
        ReapError: of the format: a field could not be read again.
        OSError: the disk refused.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    head = form.complete(content, _bytes(stored))
    save_tensors(stored, path, {form.name: json.dumps(head)})
    return head


def read_tensors(
    path: str | os.PathLike[str], form: Format
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checked head of a file, and all its tensors, on the CPU; they may lie in the file.

    Raises:
        ReapError: of the format: the file cannot be read, is of another format or version, or is
            damaged; the message names file, field and remedy.
    """
    try:
        open_file(path).close()  # a pipe would be waited for
        with safe_open(os.fspath(path), framework="pt") as file:
            text = (file.metadata() or {}).get(form.name)
            names = file.keys() if text is not None else ()
            tensors = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        why = f"cannot be read ({error.strerror or error})"
        raise form.refusal(path, why) from error
    except (SafetensorError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise form.refusal(path, f"cannot be read ({str(error)[:300]})") from error
    if text is None:
        raise form.refusal(path, f"is not a {form.what}: its metadata has no {form.name!r}")
    return form.parse(text, path, _bytes(tensors)), tensors


def _bytes(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Name, dtype, shape and bytes of every tensor, in the order of their names."""
    for name in sorted(tensors):
        tensor = tensors[name]
        yield json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
