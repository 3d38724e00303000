"""compressed-tensors: it has the values that tests of the default run compare ours with."""

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from tests.driver.streaming.packing import CASES


def library(parts: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """What the library makes of a matrix."""
    scheme = QuantizationScheme.model_validate(settings["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    return compressor.decompress(dict(parts), scheme)["weight"].data


@pytest.mark.parametrize("name", CASES)
def test_definition(name: str) -> None:
    settings, make = CASES[name]
    parts, value = make(40, 96, np.random.default_rng(0))
    if parts["weight_scale"].shape == (
        40,
    ):  # as older versions wrote rows; this one cannot read it
        parts["weight_scale"] = parts["weight_scale"][:, None]
    theirs = library(parts, settings)
    assert theirs.dtype == value.dtype
    assert torch.equal(theirs, value)
