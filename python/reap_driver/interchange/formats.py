"""The table of formats: what a file of another tool holds, what it is made from, and how one is
known.

Nothing here imports torch, so that `--help` can list the formats. A format's module has `read(path,
model)` where it can be read, and `write(path, source)` where it can be written; see `content`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Literal

# Our own files, by what they hold.
OWN = ("stats", "plan")
Holds = Literal["stats", "plan", "ranking", "counts", "placement", "bits"]


@dataclass(frozen=True)
class ForeignFormat:
    """A format of another tool.

    Attributes:
        name: by which it is asked for.
        what: a file of it, in words.
        holds: "stats" or "plan" is what it is imported as; a ranking, counts, bits or a placement
            of experts is only written.
        made_from: "stats" or "plan", which it is written from.
        module: of this package.
        reads, writes: whether it can be.
        options: options of a conversion that writing it takes besides; those in `needs` it cannot
            do without.
        needs: see `options`; "model" is the checkpoint, of which only the configuration is read.
            Whatever is read needs it, too.
        keys: names by all of which, at its top, a JSON object is known to be of the format; empty
            where it has none of its own.
        suffix: that the tool insists on; empty: none.
        named: what the tool expects the file to be called; empty: anything.
    """

    name: str
    what: str
    holds: Holds
    made_from: Literal["stats", "plan"]
    module: str
    reads: bool = False
    writes: bool = True
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    keys: frozenset[str] = frozenset()
    suffix: str = ""
    named: str = ""

    def code(self) -> ModuleType:
        """Its module, imported."""
        return import_module(f"reap_driver.interchange.{self.module}")


_FORMATS = (
    ForeignFormat(
        "reap-reference",
        "observation file of the reference implementation of REAP",
        "stats",
        "stats",
        "reference_observations",
        reads=True,
    ),
    ForeignFormat(
        "riy",
        "Reap-It-Yourself profile for vLLM",
        "plan",
        "plan",
        "riy_profile",
        reads=True,
        keys=frozenset({"pruned_experts"}),
    ),
    ForeignFormat(
        "llm-compressor",
        "report of llm-compressor's REAP, report_path",
        "plan",
        "plan",
        "llm_compressor_report",
        reads=True,
        suffix=".json",
    ),
    ForeignFormat(
        "hipfire",
        "kept-experts map of hipfire, reap_plan.json",
        "plan",
        "plan",
        "kept_maps",
        reads=True,
        needs=("model",),
        keys=frozenset({"num_layers", "keep"}),
        named="reap_plan.json",
    ),
    ForeignFormat(
        "hipfire-older",
        "older kept-experts map of hipfire, keep_by_layer.json",
        "plan",
        "plan",
        "older_kept_maps",
        reads=True,
        needs=("model",),
        keys=frozenset({"kept_per_layer", "keep"}),
        named="keep_by_layer.json",
    ),
    ForeignFormat(
        "vllm-ascend-list",
        "expert list of vllm-ascend, JSON lines",
        "ranking",
        "stats",
        "ascend_expert_list",
        options=("plan", "criterion"),
    ),
    ForeignFormat(
        "vllm-ascend-map",
        "expert map of vllm-ascend, expert_map.json",
        "placement",
        "stats",
        "ascend_expert_map",
        options=("plan", "ep"),
        needs=("ep",),
    ),
    ForeignFormat(
        "sglang",
        "expert location file of SGLang, logical_count",
        "counts",
        "stats",
        "sglang_expert_location",
        options=("plan",),
        needs=("model",),
        suffix=".json",
    ),
    ForeignFormat(
        "csv",
        "table of the experts, CSV",
        "ranking",
        "stats",
        "expert_table",
        options=("plan", "criterion", "bits"),
    ),
    ForeignFormat(
        "auto-round",
        "layer_config of AutoRound, bits by expert",
        "bits",
        "stats",
        "auto_round_bits",
        options=("plan", "bits"),
        needs=("bits",),
    ),
)
FORMATS: Mapping[str, ForeignFormat] = {one.name: one for one in _FORMATS}
