"""Observing a checkpoint layer by layer from Python: batches in, statistics out."""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.base.interrupts import Stop
from reap_driver.load.streamed_model import open_streamed
from reap_driver.observation.observer import observe
from reap_driver.observation.run import Given, Run, run_streamed
from reap_driver.observation.state_store import Place, StateStore
from reap_kernels import SaliencyStats


@typed
def observe_streamed(
    path_or_id: str | Path,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    groups: Sequence[str] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    park: Place = "device",
    park_folder: str | Path | None = None,
    backend: str | None = None,
    trust_remote_code: bool = False,
) -> SaliencyStats:
    """Statistics of a checkpoint that need not fit in memory: one decoder layer at a time.

    Each layer is read once and run on all batches while the next is read; memory holds two layers,
    what is not in layers (embeddings, head), and the batches' states between two layers. The
    statistics are those of `observe` on the loaded model, bit for bit.

    Args:
        path_or_id: folder of a checkpoint in safetensors, or a hub id.
        batches: arguments of the model for each batch (`input_ids` [batch, seq] int64, perhaps
            `attention_mask`, and the observer's `token_mask`); used once a layer.
        groups: the calibration group of each batch; default all in one.
        dtype: of the weights in memory; `auto` is the checkpoint's.
        device: where the model computes.
        park: where states lie between layers: "device", "host" (pinned memory) or "file".
        park_folder: where files go; default a temporary folder.
        backend: kernel backend, never falling back.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        DataError: no batch, or not one group for each.
        CheckpointError, UnsupportedModel: see `load_model`; or the model hands on more between its
            layers than can be kept.
    """
    given = Given.checked(batches, groups)
    with contextlib.ExitStack() as stack:
        folder = park_folder
        if park == "file" and folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="reap-states-"))
        streamed = stack.enter_context(
            open_streamed(
                path_or_id, dtype=dtype, device=device, trust_remote_code=trust_remote_code
            )
        )
        store = StateStore(park, streamed.device, None if folder is None else Path(folder))
        stack.callback(store.close)
        observer = observe(streamed.model, backend=backend)
        run = Run(observer, given, range(len(batches)), Stop())
        run_streamed(run, streamed, store)
        return observer.stats
