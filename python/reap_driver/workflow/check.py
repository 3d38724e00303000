"""Checking before serving: whether an engine would take what a plan leaves, or a checkpoint."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

from reap_driver.compat.load_pruned import SETTINGS
from reap_driver.compat.model_config import quantization_settings
from reap_driver.planning.plan import Plan
from reap_driver.planning.serving import Served, Server, obstacles, remarks
from reap_driver.workflow.errors import OptionError
from reap_driver.workflow.exchange_jobs import CheckOptions
from reap_driver.workflow.inspection import Model, inspect_model
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.plan import Planned, plan_of
from reap_driver.workflow.plan_sizes import model_of
from reap_driver.workflow.results import Result
from reap_kernels.errors import PlanError
from reap_kernels.files import is_file


@dataclass(frozen=True, repr=False)
class Checked(Result):
    """What is known of an engine that would serve a model.

    Attributes:
        server: the engine, and how it is started.
        obstacles: why it would refuse the model, each with what to do.

    Example:
        >>> rd.check(plan, serve="vllm", tp=2).obstacles
        ()
    """

    server: Server
    obstacles: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        asked = {"serve": self.server.engine, "tp": self.server.tp, "ep": self.server.ep}
        return {**asked, "obstacles": list(self.obstacles), "notes": list(self.notes)}

    def describe(self) -> str:
        """See `Result`."""
        how = f"{self.server.engine} with tp {self.server.tp} and ep {self.server.ep}"
        if not self.obstacles:
            return f"nothing is known that {how} would refuse"
        return "\n  ".join([f"{how} would refuse it:", *self.obstacles])

    def require(self) -> None:
        """Raises PlanError where the engine would refuse the model; its `known` has the facts."""
        if self.obstacles:
            how = f"{self.server.engine} (tp {self.server.tp}, ep {self.server.ep})"
            error = PlanError(f"{how} would refuse the model: {'; '.join(self.obstacles)}")
            error.known = self.facts()
            raise error


def check(options: CheckOptions, listener: Listener | None = None) -> Checked:
    """Looks and compares; see `reap_driver.check`."""
    heard = Collector(listener)
    server = Server(options.serve, options.tp, options.ep)
    served = _served(options)
    for remark in remarks(served, server):
        heard.note(remark)
    return Checked(heard.notes, server, tuple(obstacles(served, server)))


def _served(options: CheckOptions) -> Served:
    """The model as it is served."""
    source, trust = options.source, options.trust_remote_code
    if not isinstance(source, str | Path | Plan | Planned):
        raise OptionError(
            f"SOURCE is a {type(source).__name__}; give a plan, or the name of one or of a model"
        )
    if isinstance(source, Plan | Planned) or is_file(source):
        plan = plan_of(source)
        model = model_of(options.model, plan.record, trust=trust, what="plan")
        return _of(model, _left(plan, model), uniform=plan.uniform)
    if options.model is not None:
        raise OptionError(f"`model={options.model}`: only with a plan as SOURCE")
    model = inspect_model(str(source), trust_remote_code=trust)
    uniform = getattr(model.config, SETTINGS, None) is None
    return _of(model, model.provenance["layers"], uniform=uniform)


def _left(plan: Plan, model: Model) -> dict[str, dict[str, Any]]:
    """Facts of each layer after a plan."""
    found = {}
    for name, facts in model.provenance["layers"].items():
        layer = plan.layers.get(name)
        found[name] = dict(facts)
        if layer is not None:
            found[name]["num_experts"] = len(layer.kept)
            found[name]["intermediate_size"] = layer.narrow_width or facts["intermediate_size"]
    return found


def _of(model: Model, layers: Mapping[str, Mapping[str, Any]], *, uniform: bool) -> Served:
    blocks, groups = _scales(quantization_settings(model.config) or {})
    kind = model.provenance["model"]["model_type"]
    return Served(kind, layers, uniform, lcm(*blocks), lcm(*groups))


def _scales(settings: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Sizes of the blocks and of the groups that share a scale, by a quantization's settings: of
    FP8 in blocks, of GPTQ, AWQ and AutoRound, and of compressed-tensors.
    """
    groups = settings.get("config_groups")
    schemes = [settings, *_records(groups.values() if isinstance(groups, Mapping) else ())]
    weights = _records(scheme.get("weights") for scheme in schemes)
    blocks = [settings.get("weight_block_size"), *(one.get("block_structure") for one in weights)]
    sizes = [settings.get("group_size"), *(one.get("group_size") for one in weights)]
    sides = [size for block in blocks if isinstance(block, list) for size in block]
    return _positive(sides), _positive(sizes)


def _records(values: Iterable[object]) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, Mapping)]


def _positive(values: Iterable[object]) -> list[int]:
    return [value for value in values if type(value) is int and value > 0]
