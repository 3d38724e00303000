"""Whole tiny models on a GPU, beside the same models on the CPU: observed, masked, compared,
searched, cut and re-fitted, in float32.

`bench.gpu.queue` runs these checks in groups, `pytest -m gpu` each of them.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.verify import CheckFailed, NotHere
from reap_kernels import LayerStats
from reap_kernels.stats import COUNTS, SUMS
from reap_kernels.testing import largest_relative_error
from tests.gpu.checks import Check

DRIVER = "driver"
# float32 on both sides, which add in other orders; a few layers of it.
_SUMS, _LOGITS, _SOLVED = 1e-4, 1e-4, 1e-3
# Modules whose absence is a mistake.
_OURS = ("bench", "reap_driver", "reap_kernels", "tests")
_ARCHITECTURES = ("qwen3_moe", "deepseek_v3", "gpt_oss")
Batch = dict[str, Tensor]
Run = Callable[..., str]
# Name, check, and what it takes beside device, backend and dtype.
Group = tuple[tuple[str, Run, tuple[object, ...]], ...]


def library() -> Any:
    """`reap_driver`, which needs transformers."""
    import reap_driver as rd

    return rd


def pair(name: str, device: torch.device, **config: Any) -> tuple[Any, Any, list[Batch]]:
    """A tiny model on the CPU, its copy on the device, and batches on the CPU."""
    from tests.driver import zoo

    found, model = zoo.tiny(name, **config)
    batches = [zoo.tiny_inputs(name, found, batch=4, seq=32, seed=seed) for seed in range(4)]
    return model, copy.deepcopy(model).to(device), batches


def observed(model: Any, batches: list[Batch], **how: Any) -> Any:
    """Statistics of a model."""
    with library().observe(model, **how) as obs:
        for batch in batches:
            obs(**batch)
    return obs.stats


def same(mine: Any, theirs: Any) -> str:
    """Raises where statistics of a device are not those of the CPU; else says how near they are."""
    if list(mine.layers) != list(theirs.layers):
        raise CheckFailed(f"layers {list(mine.layers)} instead of {list(theirs.layers)}")
    worst = 0.0
    for name, layer in mine.layers.items():
        worst = max(worst, _error(name, layer, theirs.layers[name]))
    return f"sums within {worst:.1e} of the CPU's"


def _error(name: str, mine: LayerStats, theirs: LayerStats) -> float:
    ours, other = mine.fields(), theirs.fields()
    for field in COUNTS:
        if not torch.equal(ours[field], other[field]):
            raise CheckFailed(f"{field} of {name} differs from the CPU's")
    worst = max(largest_relative_error(ours[field], other[field]) for field in SUMS)
    if not worst <= _SUMS:
        raise CheckFailed(f"sums of {name} are off by {worst:.1e}, {_SUMS:.0e} is allowed")
    return worst


def near(mine: Tensor, theirs: Tensor, bound: float, what: str) -> str:
    """Raises where tensors differ by more than a bound (Frobenius, relative)."""
    mine, theirs = mine.cpu().double(), theirs.cpu().double()
    error = float((mine - theirs).norm() / theirs.norm().clamp_min(1e-30))
    if not error <= bound:
        raise CheckFailed(f"{what} is off by {error:.1e}, {bound:.0e} is allowed")
    return f"{what} within {error:.1e}"


# -- observing -------------------------------------------------------------------------------------


def plain(device: torch.device, _: str, __: torch.dtype, name: str) -> str:
    """Statistics of every architecture that is computed in another way."""
    cpu, there, batches = pair(name, device)
    return same(observed(there, batches), observed(cpu, batches))


def padded(device: torch.device, _: str, __: torch.dtype) -> str:
    """Padding is not counted."""
    cpu, there, batches = pair("qwen3_moe", device)
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 20:] = 0
    return same(observed(there, batches), observed(cpu, batches))


def packed(device: torch.device, _: str, __: torch.dtype) -> str:
    """Documents in one row do not attend to each other."""
    cpu, there, batches = pair("qwen3_moe", device)
    positions = torch.cat([torch.arange(20), torch.arange(12)]).expand(4, -1)
    batches = [{**batch, "position_ids": positions} for batch in batches]
    found = same(observed(there, batches), observed(cpu, batches))
    apart = [
        {"input_ids": part}
        for batch in batches
        for part in (batch["input_ids"][:, :20], batch["input_ids"][:, 20:])
    ]
    same(observed(there, batches), observed(there, apart))
    return found


def grouped(device: torch.device, _: str, __: torch.dtype) -> str:
    """Statistics by group, and what a group and the others have together."""
    cpu, there, batches = pair("qwen3_moe", device)
    both = []
    for model in (there, cpu):
        with library().observe(model) as obs:
            for number, batch in enumerate(batches):
                with obs.group("code" if number % 2 else "text"):
                    obs(**batch)
        both.append(obs.stats)
    return same(*both)


def autocast(device: torch.device, _: str, __: torch.dtype, name: str) -> str:
    """Under autocast experts compute in its dtype, and the output is the model's own."""
    _cpu, there, batches = pair(name, device)
    batch = {key: value.to(device) for key, value in batches[0].items()}
    with torch.autocast(device.type, torch.bfloat16), library().observe(there) as obs:
        logits = obs(**batch).logits
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        own = there(**batch, use_cache=False).logits[:, -logits.shape[1] :]
    return near(logits, own, 0.03, "the output under autocast")


def compiled(device: torch.device, _: str, __: torch.dtype) -> str:
    """A model that `torch.compile` wraps is observed as the model inside."""
    _cpu, there, batches = pair("qwen3_moe", device, num_hidden_layers=1)
    want = observed(there, batches)
    wrapped = torch.compile(there, backend="eager")
    return same(observed(wrapped, batches), want)


def failed_forward(device: torch.device, _: str, __: torch.dtype) -> str:
    """A forward that fails in its last layer leaves the statistics as they were."""
    _cpu, there, batches = pair("qwen3_moe", device)
    head = there.lm_head

    def raises(*_: object) -> None:
        raise RuntimeError("on purpose")

    with library().observe(there) as obs:
        obs(**batches[0])
        before = obs.stats
        handle = head.register_forward_pre_hook(raises)
        try:
            obs(**batches[1])
        except RuntimeError as error:
            if "on purpose" not in str(error):
                raise
        finally:
            handle.remove()
        after = obs.stats
    for name, layer in before.layers.items():
        for field, value in layer.fields().items():
            if not torch.equal(value, after.layers[name].fields()[field]):
                raise CheckFailed(f"{field} of {name} was changed by a forward that failed")
    return "statistics as before"


def not_finite(device: torch.device, _: str, __: torch.dtype) -> str:
    """Inputs that are not finite are an error of the library's, with the layer's name."""
    rd = library()
    from reap_kernels.errors import ReapError

    _cpu, there, batches = pair("qwen3_moe", device)
    with torch.no_grad():
        there.model.embed_tokens.weight[:] = torch.nan
    try:
        with rd.observe(there) as obs:
            obs(**batches[0])
            obs.stats  # noqa: B018  is checked where it is read
    except ReapError as error:
        return f"refused: {str(error)[:80]}"
    raise CheckFailed("NaN was observed without an error")


def refused(device: torch.device, _: str, __: torch.dtype, layer: int) -> str:
    """A layer whose weights are described wrongly is refused by the check of its first call."""
    import dataclasses
    from unittest import mock

    from reap_driver.observation.layer_recorder import LayerRecorder
    from reap_kernels.errors import UnsupportedModel

    _cpu, there, batches = pair("qwen3_moe", device)
    own, bad = LayerRecorder.weights, library().find_moe_layers(there)[layer].name

    def weights(self: LayerRecorder) -> Any:
        found = own(self)
        return dataclasses.replace(found, down=1.01 * found.down) if self.name == bad else found

    with mock.patch.object(LayerRecorder, "weights", weights):
        try:
            observed(there, batches)
        except UnsupportedModel as error:
            if str(error).startswith(bad):
                return f"refused: {str(error)[:80]}"
            raise
    raise CheckFailed(f"{bad} computes something else and was observed")


def images(device: torch.device, _: str, __: torch.dtype) -> str:
    """A record with an image, by the model that takes it."""
    from reap_driver.compat.model_config import load_config
    from reap_driver.data.batches import PackedBatches
    from reap_driver.data.encode import Encoder
    from reap_driver.data.packing import pack
    from reap_driver.data.source import DataSource
    from tests.driver.images import tiny

    torch.backends.cudnn.allow_tf32 = False  # patches are embedded by a convolution
    with tempfile.TemporaryDirectory(prefix="reap-images-") as root:
        folder = Path(root)
        tiny.write(folder / "model", tiny.QWEN)
        (folder / "a.png").write_bytes(tiny.png())
        record = {"messages": [tiny.says("see ", {"type": "image", "path": "a.png"})]}
        (folder / "data.jsonl").write_text(json.dumps(record) + "\n")
        encoder = Encoder(folder / "model", load_config(folder / "model"))
        source = pack(DataSource.parse(str(folder / "data.jsonl")), encoder, seq_len=64)
        data = PackedBatches([source], [1])
        given = [data.inputs(number) for number in range(len(data))]
        both = []
        for where in (device, torch.device("cpu")):
            model = library().load_model(folder / "model", device=where)
            both.append(observed(model, given))
    return same(*both)


def offloaded(device: torch.device, _: str, __: torch.dtype) -> str:
    """Modules that wait on the host and on the disk."""
    rd = library()
    from tests.driver.writer import saved

    with tempfile.TemporaryDirectory(prefix="reap-offloaded-") as root:
        folder = Path(root) / "model"
        saved.save("qwen3_moe", folder)
        _cpu, _there, batches = pair("qwen3_moe", torch.device("cpu"))
        want = observed(rd.load_model(folder), batches)
        name = str(device)
        places = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), name)
        places |= {"model.rotary_emb": name, "model.layers.0": "cpu", "model.layers.1": "disk"}
        model = rd.load_model(folder, device_map=places, offload_folder=Path(root) / "off")
        return same(observed(model, batches), want)


def predicting(device: torch.device, _: str, __: torch.dtype) -> str:
    """A multi-token-prediction layer that is observed with the others."""
    rd = library()
    from tests.driver.observation import test_mtp as given
    from tests.driver.writer import saved
    from tests.driver.writer.test_mtp import add_layer

    with tempfile.TemporaryDirectory(prefix="reap-mtp-") as root:
        folder = Path(root) / "model"
        saved.save("deepseek_v3", folder)
        torch.manual_seed(1)
        add_layer(folder, "model.layers.2.", given.MTP, given.own_tensors())
        saved.change_config(folder, num_nextn_predict_layers=1)
        ids = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(0))
        places = (device, torch.device("cpu"))
        models = (rd.load_model(folder, device=where, with_mtp=True) for where in places)
        both = [observed(model, [{"input_ids": ids}]) for model in models]
    if given.LAYER not in both[0].layers:
        raise CheckFailed(f"{given.LAYER} was not observed")
    return same(*both)


# -- plans -----------------------------------------------------------------------------------------


def masked(device: torch.device, _: str, __: torch.dtype, name: str) -> str:
    """Logits without some experts, and the model's own bits afterwards."""
    cpu, there, batches = pair(name, device)
    rd, outputs = library(), []
    for model in (there, cpu):
        batch = {key: value.to(model.device) for key, value in batches[0].items()}
        kept = {layer.name: [0, 1, 3, 4, 5, 7] for layer in rd.find_moe_layers(model)}
        with torch.no_grad():
            before = model(**batch).logits
            with rd.masked_experts(model, kept) as mask:
                outputs.append(model(**batch).logits)
            if mask.unused:
                raise CheckFailed(f"router weights {mask.unused} were not used")
            if not torch.equal(before, model(**batch).logits):
                raise CheckFailed("the model has other bits after its mask")
        if torch.equal(before, outputs[-1]):
            raise CheckFailed("the mask changes nothing")
    return near(*outputs, _LOGITS, "masked logits")


def _scores(model: Any, batches: list[Batch]) -> Any:
    return library().score(observed(model, batches))


def compared(device: torch.device, _: str, __: torch.dtype) -> str:
    """Figures of two plans, both compared with the original in one pass."""
    cpu, there, batches = pair("qwen3_moe", device)
    rd, found = library(), []
    from reap_driver.evaluation.models import PlannedModel, compare_resident
    from reap_driver.evaluation.router_masks import RouterMasks
    from reap_driver.observation.run import BatchList

    scores = _scores(cpu, batches)
    plans = [rd.make_plan(scores, ratio) for ratio in (0.5, 0.25)]
    for model in (there, cpu):
        masks, given = RouterMasks(model), BatchList.checked(batches, None)
        others = [PlannedModel(masks, plan, None) for plan in plans]
        sums = compare_resident(model, others, given, range(len(batches)))
        found.append([one.comparison(100, 0) for one in sums])
    said = []
    for mine, theirs in zip(*found, strict=True):
        if not torch.equal(mine.counts, theirs.counts):
            raise CheckFailed("another number of predictions counts than on the CPU")
        # Losses, divergence and acceptance; equal most likely tokens are a count.
        said.append(near(mine.sums[:, :4], theirs.sums[:, :4], _LOGITS, "figures"))
    alone = rd.compare_models(there, plans[0], batches)
    if not torch.equal(alone.sums, found[0][0].sums):
        raise CheckFailed("a plan compared beside another has other figures than alone")
    return "; ".join(said)


def searched(device: torch.device, _: str, __: torch.dtype) -> str:
    """A search on the device removes as many experts as asked, and its plan is no worse than the
    uniform one by the CPU's own measure.
    """
    from reap_driver.evaluation.router_masks import RouterMasks
    from reap_driver.plan_search.budget_search import Task
    from reap_driver.plan_search.evolution import Settings
    from reap_driver.plan_search.fitness import Fitness

    cpu, there, batches = pair("qwen3_moe", device, num_hidden_layers=4)
    rd, settings = library(), Settings(evaluations=24, population=8, elites=2, seed=1)
    scores = _scores(cpu, batches)
    uniform = rd.make_plan(scores, 0.25)
    plan = rd.search_plan(there, scores, batches, 0.25, settings=settings)
    removed = [[len(layer.removed) for layer in p.layers.values()] for p in (plan, uniform)]
    if sum(removed[0]) != sum(removed[1]):
        raise CheckFailed(f"{removed[0]} experts are removed, as many as {removed[1]} should be")
    measured = Task(scores, uniform).measured(Fitness(cpu, batches), RouterMasks(cpu))
    worth = [measured(lost) for lost in removed]
    if not worth[0] >= worth[1] - _LOGITS:
        raise CheckFailed(
            f"the plan's acceptance is {worth[0]:.4f}, the uniform one's {worth[1]:.4f}"
        )
    return f"acceptance {worth[0]:.4f}, uniform {worth[1]:.4f}"


def narrowed(device: torch.device, _: str, __: torch.dtype) -> str:
    """Gram matrices of the device, and the neurons and down projections that follow from them."""
    cpu, there, batches = pair("qwen3_moe", device)
    rd, cuts, grams = library(), [], []
    for model in (there, cpu):
        with rd.observe(model, gram=True) as obs:
            for batch in batches:
                obs(**batch)
        name, sums = next(iter(obs.grams.items()))
        down = dict(model.named_modules())[name].down_proj.detach()
        grams.append(sums.gram.cpu().tril())
        cuts.append(rd.prune_width(down, sums.to(down.device), 16))
    found = near(*grams, _SOLVED, "the Gram matrices")
    return f"{found}; {near(cuts[0].down, cuts[1].down, _SOLVED, 'down projections')}"


def refitted(device: torch.device, _: str, __: torch.dtype) -> str:
    """Down projections solved again, and the error that they leave."""
    cpu, _there, batches = pair("qwen3_moe", device)
    rd, found = library(), []
    from tests.driver.writer import saved

    with tempfile.TemporaryDirectory(prefix="reap-refit-") as root:
        full, small = Path(root) / "full", Path(root) / "small"
        saved.save("qwen3_moe", full)
        rd.apply_plan(full, rd.make_plan(_scores(cpu, batches), 0.25), small)
        for where in (device, torch.device("cpu")):
            models = (rd.load_model(folder, device=where) for folder in (full, small))
            found.append(rd.refit_models(*models, batches))
    mine, theirs = (one.matrices for one in found)
    if not theirs or mine.keys() != theirs.keys():
        raise CheckFailed(f"{len(mine)} layers are re-fitted, {len(theirs)} on the CPU")
    worst = [near(mine[name], theirs[name], _SOLVED, name) for name in theirs]
    return worst[-1]


def vectors(device: torch.device, _: str, __: torch.dtype) -> str:
    """Vectors of experts, and the output of the model whose experts they merge."""
    cpu, there, batches = pair("qwen3_moe", device)
    rd, sums, outputs = library(), [], []
    for model in (there, cpu):
        with rd.observe_vectors(model) as obs:
            for batch in batches:
                obs(**batch)
        sums.append(torch.stack([own.output_sum.cpu() for own in obs.vectors.values()]))
        batch = {key: value.to(model.device) for key, value in batches[0].items()}
        with torch.no_grad(), rd.merged_experts(model, obs.vectors, "m-smoe", 0.25):
            outputs.append(model(**batch).logits)
    found = near(*sums, _SUMS, "sums of outputs")
    return f"{found}; {near(*outputs, _LOGITS, 'merged logits')}"


OBSERVING: Group = (
    *((f"observed {name}", plain, (name,)) for name in _ARCHITECTURES),
    ("observed, padded", padded, ()),
    ("observed, packed documents", packed, ()),
    ("observed by group", grouped, ()),
    *((f"observed under autocast {name}", autocast, (name,)) for name in _ARCHITECTURES),
    ("observed, torch.compile", compiled, ()),
    ("forward that fails", failed_forward, ()),
    ("inputs that are not finite", not_finite, ()),
    *((f"wrong weights of layer {one}", refused, (one,)) for one in range(2)),
    ("observed, images", images, ()),
    ("observed, offloaded", offloaded, ()),
    ("observed, multi-token prediction", predicting, ()),
)
PLANS: Group = (
    *((f"masked experts {name}", masked, (name,)) for name in _ARCHITECTURES),
    ("compared models", compared, ()),
    ("searched plan", searched, ()),
    ("neurons removed", narrowed, ()),
    ("re-fitted", refitted, ()),
    ("vectors and merged experts", vectors, ()),
)


def imported(run: Run, device: torch.device, *arguments: object) -> str:
    """Runs a check, for which something may not be installed.

    Raises:
        NotHere: says what.
    """
    try:
        return run(device, *arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _OURS:
            raise
        raise NotHere(f"{error}; install it to run this check") from error


def checks(group: Group) -> list[Check]:
    """The checks of a group."""
    return [
        Check(name, DRIVER, torch.float32, partial(imported, run), own) for name, run, own in group
    ]


def plan(smoke: bool) -> list[Check]:
    """Every check; one where all would only compare the CPU with itself."""
    return checks(OBSERVING[:1] if smoke else (*OBSERVING, *PLANS))
