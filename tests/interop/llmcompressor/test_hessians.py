"""llm-compressor's GPTQ takes our Hessians of down projections, in place of the ones it sums."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian
from torch import Tensor
from transformers import AutoTokenizer

import reap_driver as rd
import reap_kernels as rk
from reap_driver.demo.corpus import load_corpus
from reap_driver.demo.evaluate import token_windows
from reap_driver.demo.run import MODEL

LAYER = "model.layers.1.mlp.experts"
ARGS = QuantizationArgs(
    num_bits=3, strategy="group", group_size=16, symmetric=True, actorder="static"
)


def gram_of(model: torch.nn.Module, windows: list[Tensor]) -> rk.LayerGram:
    """The Gram sums of the layer."""
    with rd.observe(model, gram=True) as obs:
        for ids in windows:
            obs(input_ids=ids)
    return obs.grams[LAYER]


class Rows:
    """What enters each expert's down projection in llm-compressor's form of a model, with g.

    Attributes:
        down: the down projections, one Linear per expert.
        h: of each expert, [n, I] per forward, the rows of the tokens that were sent to it.
        g: of each expert, [n] per forward, the router weights.
    """

    def __init__(self, model: torch.nn.Module, windows: list[Tensor]) -> None:
        linearize_moe(model)
        experts = model.get_submodule(LAYER)
        self.down = [expert.down_proj for expert in list(experts)[:-1]]  # then the activation
        self.h: list[list[Tensor]] = [[] for _ in self.down]
        self.g: list[list[Tensor]] = [[] for _ in self.down]
        experts.register_forward_pre_hook(self._routed)
        for linear, rows in zip(self.down, self.h, strict=True):
            linear.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0]))
        with torch.no_grad():
            for ids in windows:
                model(input_ids=ids)

    def _routed(self, _: torch.nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        """Notes the router weights of each expert's rows, in the order it computes them in."""
        _, ids, weights = inputs
        for expert, found in enumerate(self.g):
            place, token = torch.where((ids == expert).T)
            found.append(weights[token, place])

    def hessians(self, *, weighted: bool) -> Tensor:
        """llm-compressor's own sums over the rows, or over the rows times g: 2 / n sum h h^T."""
        found = []
        for linear, hs, gs in zip(self.down, self.h, self.g, strict=True):
            hessian, calls = make_empty_hessian(linear), torch.zeros(())
            for h, g in zip(hs, gs, strict=True):
                accumulate_hessian(h * g[:, None] if weighted else h, linear, hessian, calls)
            rows = torch.cat(gs).square().sum() if weighted else sum(map(len, gs))
            found.append(hessian / rows)
        return torch.stack(found)


def quantized(down: Tensor, hessians: Tensor) -> Tensor:
    """Down projections [E, H, I] by llm-compressor's GPTQ, with these Hessians."""
    groups = down.unflatten(-1, (-1, ARGS.group_size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), ARGS)
    weights, _, fell_back = quantize_weight(down.clone(), hessians.clone(), scale, zero, None, ARGS)
    assert not fell_back.any()  # no Hessian was refused
    return weights


def errors(change: Tensor, sums: rk.LayerGram) -> Tensor:
    """Of each expert: sum over its rows of g^2 ||change h||^2, float64."""
    each = [d @ sums.second(e) @ d.T for e, d in enumerate(change.double())]
    return torch.stack([matrix.trace() for matrix in each])


@pytest.fixture(scope="module")
def made() -> dict[str, Tensor | rk.LayerGram]:
    """Gram sums of calibration and of held-out text, down projections, the library's Hessians."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    windows = {}
    for split in ("calibration", "held_out"):
        text = [d for d in load_corpus(("calibration", "held_out")) if d.split == split]
        drawn = token_windows(text, tokenizer, per_domain=24, length=128)
        windows[split] = [ids for of_domain in drawn.values() for ids in of_domain.split(8)]
    model = rd.load_model(MODEL, dtype=torch.float32)
    found = {split: gram_of(model, of_split) for split, of_split in windows.items()}
    down = model.get_submodule(LAYER).down_proj.detach().clone()
    rows = Rows(model, windows["calibration"])
    own = {name: rows.hessians(weighted=name == "weighted") for name in ("plain", "weighted")}
    return {**found, "down": down, **own}


def test_ours_are_their_sums_over_rows_times_router_weights(made) -> None:
    ours = rd.down_hessians(made["calibration"])
    torch.testing.assert_close(ours, made["weighted"], rtol=1e-3, atol=1e-4)
    far = torch.nn.functional.cosine_similarity(ours.flatten(1), made["plain"].flatten(1))
    assert far.min() < 0.5  # the router weights are no detail


def test_the_weighted_error_falls(made) -> None:
    down, calibration = made["down"], made["calibration"]
    ours = quantized(down, rd.down_hessians(calibration)) - down
    theirs = quantized(down, made["plain"]) - down
    nearest = quantized(down, torch.eye(down.shape[-1]).expand(len(down), -1, -1)) - down
    for split in ("calibration", "held_out"):
        by_ours, by_theirs, by_nearest = (
            float(errors(change, made[split]).sum()) for change in (ours, theirs, nearest)
        )
        assert by_ours < by_theirs < by_nearest
        assert by_ours < 0.7 * by_nearest


def test_an_expert_without_rows_is_rounded_to_nearest(made) -> None:
    down, sums = made["down"], made["calibration"].to("cpu")
    sums.gram[3], sums.weight[3], sums.count[3] = 0, 0, 0
    found = quantized(down, rd.down_hessians(sums))
    nearest = quantized(down, torch.eye(down.shape[-1]).expand(len(down), -1, -1))
    assert torch.equal(found[3], nearest[3])
    assert found[3].any()
    zeros = rd.down_hessians(sums)
    zeros[3] = 0
    assert not quantized(down, zeros)[3].any()  # what a zero Hessian would have given
