"""Which numbers of experts in a layer, and of neurons in an expert, serving engines take, and
advice where one takes others.

vLLM and SGLang serve any number: their grouped products align the tokens of up to 991 experts, and
their routers have a general kernel beside those for single numbers (published checkpoints keep 103,
173 or 180 experts). A tuned launch table is looked up by the number of experts, and default tiles
take its place, whatever other number is left. One router has no general kernel: that of scores
sqrt(softplus(x)), DeepSeek-V4's, where vLLM 0.26 ends with `Unsupported expert number`
(github.com/vllm-project/vllm/issues/51521).

Tensor parallelism divides the neurons of every expert: both engines refuse a width that the number
of GPUs does not divide, and, in FP8 with a scale per block of 128, one whose part on each GPU is no
multiple of 128 (github.com/vllm-project/vllm/issues/54178). transformers' grouped products need
rows of 16 bytes, 8 neurons of 2 bytes.

Expert parallelism shares whole experts out. vLLM's group is that of all GPUs, tp x dp, and then no
expert is divided; it gives some GPUs one expert more where the number does not divide, but for
models whose class refuses that, DeepSeek-V4's (github.com/vllm-project/vllm/issues/52435), and for
placements that are balanced while it serves. SGLang's group is a part of the GPUs of tensor
parallelism, which divide each expert among tp / ep of them, and it takes equal shares only
(fused_moe_triton/layer.py).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reap_driver.planning.budget import Router, nearest, ratio_of
from reap_driver.planning.plan import Plan

ENGINES = ("vllm", "sglang")
# model_type of models whose class in vLLM takes equal shares of experts only.
_EQUAL_SHARES = frozenset({"deepseek_v4"})
_MARLIN = 64  # what its kernels for groups of 4-bit weights need a width to be a multiple of
_USUAL_WIDTH = 64  # a multiple of it are the experts of published models
# model_type -> numbers of experts that its router's kernels are compiled for.
_ROUTERS = {"deepseek_v4": frozenset({*(1 << n for n in range(8)), *range(192, 577, 64)})}


@dataclass(frozen=True)
class Server:
    """How an engine is started.

    Attributes:
        engine: one of `ENGINES`.
        tp: its tensor-parallel size.
        ep: GPUs that share the experts out; 1 without expert parallelism.
    """

    engine: str
    tp: int = 1
    ep: int = 1

    @property
    def parts(self) -> int:
        """GPUs that each expert is divided among."""
        if self.engine == "sglang":
            return max(1, self.tp // self.ep)
        return self.tp if self.ep == 1 else 1


@dataclass(frozen=True)
class Served:
    """A model as it is served.

    Attributes:
        model_type: of its configuration.
        layers: facts of each MoE layer, as the provenance of statistics records them, with the
            experts and the width that are left.
        uniform: whether one number of experts per layer tells all of them.
        block: neurons that share a scale in FP8 blocks; 1 without.
        group: neurons that share a scale in groups of 4- or 8-bit weights; 1 without.
    """

    model_type: str | None
    layers: Mapping[str, Mapping[str, Any]]
    uniform: bool = True
    block: int = 1
    group: int = 1


def obstacles(served: Served, server: Server) -> list[str]:
    """Why an engine that is started so would refuse a model, each with what to do; empty where
    nothing is known that it refuses.

    Example:
        >>> layers = {"a": {"num_experts": 90, "top_k": 8, "intermediate_size": 768}}
        >>> obstacles(Served("qwen3_moe", layers), Server("sglang", tp=4, ep=4))[0]
        '90 experts are not shared out equally among 4 GPUs; keep a multiple of 4, or use `ep` ...
    """
    found = list(_of_the_group(server))
    if not served.uniform:
        found.append(
            f"layers have different numbers of experts, and {server.engine} reads one for all; "
            "plan with `allocation='uniform'`"
        )
    for facts in served.layers.values():
        found += [*_of_routing(facts), *_of_counts(served, facts, server)]
        found += _of_width(served, int(facts["intermediate_size"]), server)
    return list(dict.fromkeys(found))


def remarks(served: Served, server: Server) -> list[str]:
    """What an engine serves less well than it could, each with what to do."""
    found = []
    for facts in served.layers.values():
        experts, width = int(facts["num_experts"]), int(facts["intermediate_size"])
        if server.engine == "vllm" and experts % server.ep:
            found.append(
                f"{experts} experts are not shared out equally among {server.ep} GPUs: some have "
                "one more, and every step waits for them; keep a multiple, which a balanced "
                "placement (EPLB) needs"
            )
        part, needed = width // server.parts, max(_MARLIN, served.group)
        if served.group > 1 and width % server.parts == 0 and part % needed:
            found.append(
                f"{part} neurons of each expert on a GPU are no multiple of {needed}, so the "
                "faster kernels (Marlin) for these weights are not used; use a smaller `tp`, or "
                "`ep`"
            )
    return list(dict.fromkeys(found))


def _of_the_group(server: Server) -> Iterator[str]:
    """Sizes of parallel groups that do not go together."""
    if _goes(server.ep, server):
        return
    if server.engine == "sglang":
        yield (
            f"SGLang shares experts out among a part of the GPUs of tensor parallelism, and "
            f"`ep={server.ep}` does not divide `tp={server.tp}`; use a divisor"
        )
    else:
        yield (
            f"vLLM shares experts out among all GPUs, tensor-parallel size times data-parallel "
            f"size, and `ep={server.ep}` is no multiple of `tp={server.tp}`; use one"
        )


def _of_routing(facts: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that no router can choose by."""
    experts, top_k = int(facts["num_experts"]), int(facts["top_k"])
    groups, chosen = facts.get("n_group") or 1, facts.get("topk_group") or 1
    if experts % groups:
        yield (
            f"{experts} experts do not divide into {groups} routing groups; plan again with "
            "reap-kernels, which keeps groups equal"
        )
        return
    size = experts // groups
    if top_k > chosen * size:
        yield (
            f"a token is routed to {top_k} experts, and {chosen} of {groups} routing groups hold "
            f"{chosen * size}; keep more experts"
        )
    if groups > 1 and size < 2:
        yield (
            f"{size} expert is left in a routing group, which routers score by its two best; keep "
            "two in each"
        )


def _of_counts(served: Served, facts: Mapping[str, Any], server: Server) -> Iterator[str]:
    """Numbers of experts that the router's kernels or expert parallelism do not take."""
    experts, kind = int(facts["num_experts"]), served.model_type
    if not is_served(experts, kind):
        offers = " or ".join(map(str, nearest(_ROUTERS[str(kind)], experts)))
        yield f"the router for {kind} has no kernel for {experts} experts; keep {offers}"
    strict = server.engine == "sglang" or kind in _EQUAL_SHARES
    if strict and experts % server.ep:
        fits = ", ".join(str(n) for n in _divisors(experts, server.ep) if _goes(n, server))
        yield (
            f"{experts} experts are not shared out equally among {server.ep} GPUs; keep a multiple "
            f"of {server.ep}, or use `ep` as one of {fits}"
        )


def _of_width(served: Served, width: int, server: Server) -> Iterator[str]:
    """Widths that tensor parallelism does not divide."""
    parts = server.parts
    if width % parts == 0 and (width // parts) % served.block == 0:
        return
    fits = [n for n in _divisors(width, parts) if (width // n) % served.block == 0]
    blocks = f" of whole blocks of {served.block}" if served.block > 1 else ""
    remedy = "no number of GPUs fits, so serve weights without blocks"
    if fits:
        remedy = f"divide them among {max(fits)} at most, or leave experts whole by `ep`"
    yield f"{width} neurons of each expert do not divide into {parts} parts{blocks}; {remedy}"


def _goes(ep: int, server: Server) -> bool:
    """Whether an engine can share experts out among so many GPUs at its tensor-parallel size."""
    return ep == 1 or (server.tp % ep if server.engine == "sglang" else ep % server.tp) == 0


def _divisors(number: int, most: int) -> list[int]:
    """Divisors up to `most`."""
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def is_served(experts: int, model_type: str | None) -> bool:
    """Whether vLLM and SGLang serve a model of this type with so many experts in each layer.

    Example:
        >>> is_served(173, "step3p5"), is_served(144, "deepseek_v4")
        (True, False)
    """
    return model_type not in _ROUTERS or experts in _ROUTERS[model_type]


def served_advice(plan: Plan, layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """For each number of experts that an engine refuses, the ratios of the nearest it takes; and
    for each width that fewer GPUs can divide than before, how many.

    Args:
        plan: one that leaves layers of different numbers is refused as a whole, so nothing is said.
        layers: facts of each layer, as the provenance of statistics records them.

    Raises:
        PlanError: the facts of a layer do not say how it routes.
    """
    kind = plan.model.get("model_type")
    found: dict[tuple[int, int], str] = {}
    for name, layer in plan.layers.items() if plan.uniform and kind in _ROUTERS else ():
        kept, total = len(layer.kept), layer.num_experts
        if name not in layers or not layer.removed or is_served(kept, kind):
            continue
        router = Router.of(name, layers[name])
        held = plan.settings.get("protected", {}).get(name, ())
        possible = range(total - router.most(held), total)
        fit = [n for n in possible if is_served(n, kind) and n % router.n_group == 0]
        offers = [f"{n} (ratio {ratio_of(total - n, total):g})" for n in nearest(fit, kept)]
        found[kept, total] = (
            f"keeps {kept} of {total} experts in a layer, a number that vLLM's router for {kind} "
            f"refuses; it takes {' or '.join(offers) or 'none that this layer can be left with'}"
        )
    return [*found.values(), *_width_advice(plan)]


def _width_advice(plan: Plan) -> list[str]:
    """What a width costs that is a multiple of less than the one before."""
    found = []
    widths = {(la.width, la.narrow_width) for la in plan.layers.values()}
    for before, after in sorted((b, a) for b, a in widths if b is not None and a is not None):
        parts = math.gcd(after, _USUAL_WIDTH)
        if parts < math.gcd(before, _USUAL_WIDTH):
            rows = "" if parts % 8 == 0 else ", and transformers' grouped products a multiple of 8"
            found.append(
                f"leaves {after} of {before} neurons in an expert: by tensor parallelism vLLM and "
                f"SGLang divide them among at most {parts} GPUs (a power of two), and FP8 blocks "
                f"need a multiple of 128 on each{rows}; plan with `width_multiple={_USUAL_WIDTH}`, "
                "or 128 times the number of GPUs"
            )
    return found
