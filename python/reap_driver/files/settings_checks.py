"""Checks of a quantizer's settings: types of fields, names of modules, and refusals by field."""

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from reap_driver.files.quantization import REMEDY
from reap_kernels.errors import CheckpointError, UnsupportedModel
from reap_kernels.schema import Kind, Mismatch, check, short

_RESTORE = "restore config.json from where the checkpoint was published"


def check_types(value: Any, kind: Kind, where: str) -> None:
    """Checks the types of fields; `where` names checkpoint and field.

    Raises:
        CheckpointError: a value has the wrong type; names its field.
    """
    try:
        check(value, kind)
    except Mismatch as error:
        raise CheckpointError(f"{where}: {error}; {_RESTORE}") from error


def check_flag(settings: Mapping[str, Any], field: str, where: str) -> None:
    """Checks that a field is absent or says no: a feature that changes weights, and is not read.

    Raises:
        UnsupportedModel: the field has a value.
    """
    value = settings.get(field)
    if value not in (None, False, "", {}, []):
        refuse(f"{where}.{field} is {short(value)}", "checkpoints without it")


def pattern(text: str, where: str) -> re.Pattern[str]:
    """A regular expression for names of modules; `where` names the field.

    Raises:
        CheckpointError: it is none.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise CheckpointError(
            f"{where}: {short(text)} is not a regular expression ({error}); {_RESTORE}"
        ) from error


def refuse(what: str, readable: str) -> NoReturn:
    """Raises UnsupportedModel: what there is, what can be read, and the remedy."""
    raise UnsupportedModel(f"{what}; {readable} can be read: {REMEDY}")
