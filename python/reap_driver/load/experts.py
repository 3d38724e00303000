"""Reads the experts of a checkpoint, with one decoder layer in memory at a time."""

from collections.abc import Collection, Generator
from pathlib import Path

import torch

from reap_driver.load.streamed_model import open_streamed
from reap_driver.model.discover import find_moe_layers
from reap_driver.model.expert_parts import matrices_in
from reap_kernels import ExpertWeights


def read_experts(
    path_or_id: str | Path,
    names: Collection[str],
    *,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Generator[tuple[str, ExpertWeights]]:
    """The matrices of MoE layers, in the dtype of the checkpoint, quantized ones dequantized.

    Args:
        path_or_id, device, trust_remote_code: see `load_model`.
        names: of the layers, as `find_moe_layers` has them.

    Yields:
        Name and matrices of each layer, which are valid until the next one is asked for. Their
        activation is not known.

    Raises:
        CheckpointError, UnsupportedModel: see `open_streamed`; or a layer does not say which of its
            matrices is which.
    """
    with open_streamed(path_or_id, device=device, trust_remote_code=trust_remote_code) as streamed:
        layers = [layer for layer in find_moe_layers(streamed.model) if layer.name in names]
        for number, (decoder, _) in enumerate(streamed.layers):
            inside = [layer for layer in layers if layer.name.startswith(f"{decoder}.")]
            if not inside:
                continue
            streamed.ready(number)
            for layer in inside:
                yield layer.name, matrices_in(layer)
            streamed.release(number)
