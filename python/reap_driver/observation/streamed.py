"""Observes a checkpoint that need not fit in memory, one decoder layer at a time."""

import contextlib
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.base.interrupts import Stop
from reap_driver.load.streamed_model import open_streamed
from reap_driver.memory.decision import Offload
from reap_driver.model.attention import Attention
from reap_driver.observation.gram_sums import GramSink
from reap_driver.observation.observer import observe
from reap_driver.observation.run import BatchList, Run, run_streamed
from reap_driver.observation.state_store import StateStore
from reap_kernels import SaliencyStats


@typed
def observe_streamed(
    path_or_id: str | Path,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    groups: Sequence[str] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    offload: Offload = "device",
    offload_folder: str | Path | None = None,
    backend: str | None = None,
    gram: GramSink | None = None,
    attention: Attention | None = None,
    fuse: bool | None = None,
    trust_remote_code: bool = False,
    with_mtp: bool = False,
) -> SaliencyStats:
    """Collects expert statistics of a checkpoint that need not fit in memory.

    Each decoder layer is loaded once and run on all batches while the next one is loaded. Memory
    holds two layers, the weights outside of layers (embeddings, head), and the hidden states of all
    batches between two layers. The statistics are those of `observe` on the loaded model, bit for
    bit.

    Args:
        path_or_id: folder of a checkpoint in safetensors, or a Hugging Face Hub id.
        batches: keyword arguments of the model's forward for each batch: `input_ids` [batch, seq]
            int64, optionally `attention_mask` [batch, seq] and the observer's `token_mask`
            [batch, seq] bool. Each batch is used once per layer.
        groups: the calibration group of each batch; by default one group for all.
        dtype: dtype of the weights in memory; "auto" for the checkpoint's.
        device: the device that the model runs on.
        offload: where hidden states are stored between layers: "device", "host" (pinned memory) or
            "file".
        offload_folder: folder for the files; by default a temporary one.
        backend: kernel backend, without fallback; None for the best one.
        gram: called once for every MoE layer, as soon as it has run on all batches: with its name,
            its statistics, its Gram sums (`LayerGram`, on `device`), and its weights. Only the
            sums of one layer are in memory.
        attention: see `observe`.
        fuse: see `observe`.
        trust_remote_code: whether to run model code that comes with the checkpoint.
        with_mtp: also observe the multi-token-prediction layer, see `load_model`.

    Returns:
        The statistics, on the CPU.

    Raises:
        DataError: there is no batch, or the number of groups is not that of the batches; an
            expert's output was NaN or Inf.
        CheckpointError, UnsupportedModel: see `load_model`; or the model passes on more between
            its layers than can be stored.
        BackendUnavailable: see `observe`.

    Example:
        >>> stats = rd.observe_streamed("MODEL", batches, groups=["code"] * len(batches))
        >>> stats.groups
        ['code']
    """
    given = BatchList.checked(batches, groups)
    with contextlib.ExitStack() as stack:
        folder = offload_folder
        if offload == "file" and folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="reap-states-"))
        streamed = stack.enter_context(
            open_streamed(
                path_or_id,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                with_mtp=with_mtp,
            )
        )
        store = StateStore(offload, streamed.device, None if folder is None else Path(folder))
        stack.callback(store.close)
        observer = observe(
            streamed.model,
            backend=backend,
            gram=gram is not None,
            attention=attention,
            fuse=fuse,
        )
        run = Run(observer, given, range(len(batches)), Stop())
        if gram is not None:
            run.layer_done = functools.partial(observer.give_grams, sink=gram)
        run_streamed(run, streamed, store)
        return observer.stats
