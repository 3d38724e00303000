"""What `apply_plan` did."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reap_driver.plan.plan import Plan
from reap_driver.writer.specification import Specification


@dataclass
class ApplyReport:
    """Result of writing one pruned checkpoint."""

    plan: "Plan"  # that was applied, with notes of how the model differs from the plan's own
    source: Path
    out_path: Path
    layers: int  # MoE layers, without those of stacks that are left whole
    experts_before: int  # routed experts of such a layer; the largest, where numbers differ
    experts_after: int
    experts_per_layer: Mapping[str, tuple[int, int]]  # every MoE layer -> (before, after)
    whole: list[str]  # layers of stacks of which nothing is removed
    uniform: bool  # one number of experts loads every stack; else `load_pruned.py` is in the folder
    tensors: int  # written
    tensor_bytes: int  # data of these tensors
    bytes_written: int  # all files
    source_tensors: int
    source_tensor_bytes: int
    shards: int
    specification: Specification
    edited_config: Mapping[str, tuple[Any, Any]]  # dotted field of config.json -> (old, new)
    expert_keys_dropped: int  # tensors of removed experts
    tables_rewritten: int = 0  # tables of expert ids by token (DeepSeek-V4)
    mtp_dropped: list[str] = field(default_factory=list)  # keys of MTP layers left out
    left_out: list[str] = field(default_factory=list)  # other weight formats, hidden files
    cleaned: list[str] = field(default_factory=list)  # leftovers of killed runs, removed
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def pruned(self) -> Mapping[str, tuple[int, int]]:
        """Layers of the stacks that were cut -> experts (before, after)."""
        whole = set(self.whole)
        return {name: pair for name, pair in self.experts_per_layer.items() if name not in whole}
