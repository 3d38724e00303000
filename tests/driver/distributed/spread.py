"""The ranks of an expert-parallel model, and the same in one process for comparison."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.distributed import DistributedConfig

from reap_driver.evaluation.router_masks import masked_experts
from reap_driver.model.discover import find_moe_layers
from reap_driver.observation.data_parallel import Ranks, ranks
from reap_driver.observation.observer import observe
from reap_kernels import SaliencyStats
from reap_kernels.errors import DataError, UnsupportedModel
from tests.driver import zoo

# Softmax and sigmoid routers; transposed weights with biases.
OBSERVED = ("qwen3_moe", "deepseek_v3", "gpt_oss")
# Of eight experts, three in each routing group.
KEPT = [0, 1, 2, 4, 5, 7]
# Models, and ways to load them, that are refused.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "tensor parallel": ("qwen3_moe", {"tp_plan": "auto"}),
    "sharded data parallel": ("qwen3_moe", {"fsdp_size": 2}),
    "expert parallel outside the interface": (
        "step3p7",
        {"tp_plan": "auto", "enable_expert_parallel": True},
    ),
}
# Needed for sums within 1e-12: the ranks add their parts of the output in another order.
DTYPE = torch.float64


def statistics(name: str, model: Any) -> SaliencyStats:
    """Three groups: plain, with padding, and with two experts masked out of every router."""
    inputs = zoo.tiny_inputs(name, model.config)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 7:] = 0
    with observe(model) as obs:
        with obs.group("code"):
            obs(**inputs)
        with obs.group("chat"):
            obs(**zoo.tiny_inputs(name, model.config, seed=1), attention_mask=mask)
        kept = {layer.name: KEPT for layer in obs.layers}
        with obs.group("masked"), masked_experts(model, kept):
            obs(**inputs)
    return obs.stats


def checkpoint(name: str, out: Path, world: Ranks) -> tuple[type, Path]:
    """Class and folder of a tiny model that rank 0 has written."""
    _, model = zoo.tiny(name, dtype=DTYPE)
    path = out / name
    if world.rank == 0:
        model.save_pretrained(path)
    world.barrier()
    return type(model), path


def loaded(cls: Any, path: Path, **parallel: Any) -> nn.Module:
    """The model over all ranks; in this process without `parallel`."""
    model = cls.from_pretrained(
        path,
        dtype=DTYPE,
        attn_implementation="eager",
        experts_implementation="eager",
        distributed_config=DistributedConfig(**parallel) if parallel else None,
    )
    return model.eval()


def _refusal(model: nn.Module) -> str:
    try:
        find_moe_layers(model)
    except UnsupportedModel as error:
        return str(error)
    return "not refused"


def _different(name: str, model: Any, world: Ranks, what: str) -> str:
    """The error if the ranks count the same batch differently."""
    inputs = zoo.tiny_inputs(name, model.config)
    mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    mask[0, : world.rank] = False
    with observe(model) as obs:
        obs(**inputs, token_mask=mask if what == "tokens" else None)
        with obs.group("more" if what == "groups" and world.rank else obs.current):
            obs(**inputs)
    try:
        _ = obs.stats
    except DataError as error:
        return str(error)
    return "not refused"


def main(out: Path) -> None:
    with ranks() as world:
        for name in OBSERVED:
            cls, path = checkpoint(name, out, world)
            model = loaded(cls, path, tp_plan="auto", enable_expert_parallel=True)
            statistics(name, model).save(out / f"{name}.{world.rank}")
            (out / f"{name}.local.{world.rank}").write_text(
                " ".join(str(layer.local) for layer in find_moe_layers(model))
            )
            if name == "qwen3_moe":
                for what in ("tokens", "groups"):
                    said = _different(name, model, world, what)
                    (out / f"different {what}.{world.rank}").write_text(said)
        for case, (name, parallel) in REFUSED.items():
            cls, path = checkpoint(name, out, world)
            said = _refusal(loaded(cls, path, **parallel))
            (out / f"{case}.{world.rank}").write_text(said)
