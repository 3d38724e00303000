"""Totals of whole models, projected from measured layers: bytes and operations over their rates."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reap_kernels.errors import ResourceError

SEQUENCES, LENGTH = 1360, 2048
GOAL_SECONDS = 1800

_DEEPSEEK: dict[str, object] = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
}


@dataclass(frozen=True)
class Target:
    """A published model: its name, and what of its config.json sets its size."""

    name: str
    config: dict[str, object]


TARGETS = (
    Target(
        "Kimi-K2",
        {
            **_DEEPSEEK,
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "kimi_k2",
            "first_k_dense_replace": 1,
            "n_group": 1,
            "n_routed_experts": 384,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "topk_group": 1,
            "vocab_size": 163840,
        },
    ),
    Target(
        "DeepSeek-V3.2",
        {
            **_DEEPSEEK,
            "architectures": ["DeepseekV32ForCausalLM"],
            "model_type": "deepseek_v32",
            "first_k_dense_replace": 3,
            "index_head_dim": 128,
            "index_n_heads": 64,
            "index_topk": 2048,
            "n_group": 8,
            "n_routed_experts": 256,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "topk_group": 4,
            "vocab_size": 129280,
        },
    ),
)


@dataclass(frozen=True)
class Measured:
    """What layers of one format gave.

    Attributes:
        load_rate: stored bytes a second, read, copied and converted, nothing beside.
        flop_rate: operations a second, nothing beside.
        factor: overlapped over the longer of the two, of the worst layer; at least 1.
        format: of the files.
    """

    load_rate: float
    flop_rate: float
    factor: float
    format: str


def planned(
    folder: Path,
    device: torch.device,
    disk: Path,
    tokens: int,
    length: int,
    batch: int | None = None,
) -> tuple[Any, Any]:
    """Sizes of the model of a config.json in bf16, and how it would be run here, streamed.

    Raises:
        ResourceError: it does not fit.
    """
    from reap_driver.memory.decision import decide
    from reap_driver.memory.machine import this_machine
    from reap_driver.memory.workload import workload

    sizes, model, layers = _sized(folder, length)
    work = workload(
        model,
        layers,
        tokens=tokens,
        seq_len=length,
        device=device,
        dtype=torch.bfloat16,
        batch_size=batch,
    )
    return sizes, decide("always", sizes, this_machine(device, disk), work)


def _sized(folder: Path, length: int) -> tuple[Any, Any, Any]:
    """Sizes in bf16 of the model of a config.json, the model without memory, and its MoE layers."""
    from reap_driver.compat.model_config import load_config
    from reap_driver.compat.pretrained import meta_model
    from reap_driver.memory.model_sizes import model_sizes
    from reap_driver.model.discover import find_moe_layers

    model = meta_model(load_config(folder))
    layers = find_moe_layers(model)
    return model_sizes(model, layers, dtype=torch.bfloat16, seq_len=length), model, layers


def total(target: Target, measured: Measured, device: torch.device) -> dict[str, object]:
    """Columns of a model's total: bytes and operations of an average layer over measured rates.

    layers x factor x max(load, compute), and the load of the first layer, which nothing hides.
    """
    from reap_driver.memory.checkpoint_size import estimated

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(target.config))
        sizes, model, _ = _sized(folder, LENGTH)
        stored = estimated(model, model.config, torch.bfloat16).nbytes
        where = _where(folder, device)
    layers = len(sizes.layer_bytes)
    load = stored / layers / measured.load_rate
    compute = sizes.flops_per_token * SEQUENCES * LENGTH / layers / measured.flop_rate
    both = measured.factor * max(load, compute)
    longer = "loading" if load > compute else "computing"
    note = f"total = {layers} x overlapped + load of the first; overlapped = {measured.factor:.3f} "
    note += f"x {longer}; {measured.load_rate / 1e9:.4g} GB/s, {measured.flop_rate / 1e12:.4g} "
    note += f"TFLOP/s as measured; attention as in DeepSeek-V3, no indexer; {where}"
    return {
        "status": "projected",
        "sequences": SEQUENCES,
        "length": LENGTH,
        "layers": layers,
        "gb": f"{stored / layers / 1e9:.4g}",
        "total_gb": f"{stored / 1e9:.4g}",
        "load_s": f"{load:.4g}",
        "compute_s": f"{compute:.4g}",
        "overlapped_s": f"{both:.4g}",
        "overlapped/longer": f"{measured.factor:.3f}",
        "total_s": f"{layers * both + load:.4g}",
        "goal_s": GOAL_SECONDS,
        "note": note,
    }


def _where(folder: Path, device: torch.device) -> str:
    """Where states would wait on this machine, in words."""
    try:
        _, plan = planned(folder, device, folder, SEQUENCES * LENGTH, LENGTH)
    except ResourceError as error:
        return f"on this machine it would be refused: {error}"
    return f"states would wait here: {plan.offload}"
