"""The multi-token-prediction layer, observed: against transformers' own, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import reap_driver as rd
from reap_kernels import LayerStats
from reap_kernels.errors import UnsupportedModel, UsageError
from tests.driver.observation import oracle
from tests.driver.writer import saved
from tests.driver.writer.test_mtp import add_layer

MTP = "model.layers.3."  # the tiny models have layers 0 to 2
LAYER = f"{MTP}mlp.experts"
LENGTH = 12


def own_tensors(width: int = 32) -> dict[str, torch.Tensor]:
    """What an MTP layer has besides a decoder layer."""
    norms = ("enorm", "hnorm", "shared_head.norm")
    own = {f"{MTP}{name}.weight": 1 + 0.1 * torch.randn(width) for name in norms}
    return {**own, f"{MTP}eh_proj.weight": torch.randn(width, 2 * width) / 8}


@pytest.fixture(scope="module", params=["deepseek_v3", "glm4_moe", "glm4_moe_lite", "deepseek_v32"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with an MTP layer, as both publish it."""
    folder = tmp_path_factory.mktemp("mtp") / str(request.param)
    saved.save(request.param, folder)
    torch.manual_seed(1)
    add_layer(folder, "model.layers.2.", MTP, own_tensors())
    saved.change_config(folder, num_nextn_predict_layers=1)
    return folder


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 90, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def observed(folder: Path, *batches: Any, mtp: bool = True, dtype: str = "float64") -> Any:
    """Statistics of a resident model."""
    model = rd.load_model(folder, dtype=dtype, with_mtp=mtp)
    with rd.observe(model) as observer:
        for batch in batches:
            observer(**batch)
    return observer.stats


def assert_same(mine: LayerStats, other: LayerStats, bound: float = 0.0) -> None:
    """Counts equal; sums equal up to a relative bound, by default the same bits."""
    assert torch.equal(mine.count, other.count)
    assert torch.equal(mine.tokens, other.tokens)
    for name in ("router_weight_sum", "norm_sum", "weighted_norm_sum", "norm_sq_sum"):
        torch.testing.assert_close(getattr(mine, name), getattr(other, name), rtol=bound, atol=0.0)


@torch.no_grad()
def drafted(folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Statistics of what transformers' own MTP model runs, without the library."""
    main = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3\..*"]  # where it looks for keys
    model = MtpModel.from_pretrained(main)
    name = "layers.0.mtp_block.mlp.experts"
    hidden = main(ids, output_hidden_states=True).hidden_states[-1]
    with oracle.recorded(model, [name]) as calls:
        model(
            input_ids=ids[:, 1:],
            last_hidden_states=hidden[:, :-1],
            attention_mask=torch.ones_like(ids[:, 1:]),
            position_ids=torch.arange(1, ids.shape[1]).expand(len(ids), -1),
            mtp_cache=MtpCache(config=main.config.get_mtp_config()),
        )
    assert len(calls[name].inputs) == 1
    return oracle.expected(model.get_submodule(name), calls[name], 8)


def test_statistics_are_those_of_transformers(checkpoint: Path, ids: torch.Tensor) -> None:
    """Where it has such a layer."""
    if checkpoint.name not in ("deepseek_v3", "glm4_moe"):
        with pytest.raises(ValueError, match="num_mtp_layers"):
            AutoConfig.from_pretrained(checkpoint).get_mtp_config()
        return
    stats = observed(checkpoint, {"input_ids": ids})
    assert list(stats.layers)[-1] == LAYER
    assert int(stats.layers[LAYER].tokens.sum()) == 2 * (LENGTH - 1)
    oracle.assert_matches(stats.layers[LAYER], drafted(checkpoint, ids), 1e-6)


@torch.no_grad()
def test_statistics_are_those_of_the_published_formula(checkpoint: Path, ids: torch.Tensor) -> None:
    """Its weights loaded by transformers as those of a fourth decoder layer, which is run on the
    input written out.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    config.num_hidden_layers = 4
    if hasattr(config, "mlp_layer_types"):
        config.mlp_layer_types = [*config.mlp_layer_types, "sparse"]
    how: dict[str, Any] = {"dtype": torch.float64, "experts_implementation": "eager"}
    deep = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, **how)
    main = AutoModelForCausalLM.from_pretrained(checkpoint, **how)
    given: dict[str, Any] = {}
    main.model.layers[-1].register_forward_pre_hook(
        lambda _, __, kwargs: given.update(kwargs), with_kwargs=True
    )
    hidden = main.model(ids[:, :-1], use_cache=False).last_hidden_state
    row = written_out(checkpoint, hidden, ids[:, 1:], config.rms_norm_eps)
    with oracle.recorded(deep.model, ["layers.3.mlp.experts"]) as calls:
        deep.model.layers[3](row, **given)
    [truth] = calls.values()
    stats = observed(checkpoint, {"input_ids": ids})
    expected = oracle.expected(deep.model.layers[3].mlp.experts, truth, 8)
    oracle.assert_matches(stats.layers[LAYER], expected, 1e-6)


def written_out(
    checkpoint: Path, hidden: torch.Tensor, following: torch.Tensor, eps: float
) -> torch.Tensor:
    """eh_proj([enorm(embedding of the next token); hnorm(last hidden state)]) in float64."""
    tensors = {name: value.double() for name, value in saved.read_all(checkpoint).items()}

    def norm(rows: torch.Tensor, name: str) -> torch.Tensor:
        scale = (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
        return rows * scale * tensors[f"{MTP}{name}.weight"]

    embedded = tensors["model.embed_tokens.weight"][following]
    both = torch.cat([norm(embedded, "enorm"), norm(hidden, "hnorm")], dim=-1)
    return both @ tensors[f"{MTP}eh_proj.weight"].T


def test_what_the_decoder_layer_gets_is_the_published_formula(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    """eh_proj([enorm(embedding of the next token); hnorm(last hidden state)]), written out."""
    model = rd.load_model(checkpoint, dtype="float64", with_mtp=True)
    seen: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    model.model.register_forward_hook(lambda _, __, out: states.append(out.last_hidden_state))
    layer = model.get_submodule(MTP.rstrip("."))
    layer.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with rd.observe(model) as observer:
        observer(input_ids=ids)
    [hidden] = states
    wanted = written_out(checkpoint, hidden[:, :-1], ids[:, 1:], model.config.rms_norm_eps)
    [given] = seen
    torch.testing.assert_close(given[:, :-1], wanted, rtol=1e-6, atol=1e-6)


def test_other_layers_and_outputs_stay_the_same_bits(checkpoint: Path, ids: torch.Tensor) -> None:
    plain = observed(checkpoint, {"input_ids": ids}, mtp=False, dtype="float32")
    with_it = observed(checkpoint, {"input_ids": ids}, dtype="float32")
    assert plain.layers.keys() == with_it.layers.keys() - {LAYER}
    for name, layer in plain.layers.items():
        assert_same(layer, with_it.layers[name])
    models = [rd.load_model(checkpoint, dtype="float32", with_mtp=mtp) for mtp in (False, True)]
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=ids).logits for model in models))


def test_streamed_is_resident_bit_for_bit(checkpoint: Path, ids: torch.Tensor) -> None:
    batches = [{"input_ids": ids}, {"input_ids": ids.flip(1)}]
    resident = observed(checkpoint, *batches, dtype="float32")
    streamed = rd.observe_streamed(checkpoint, batches, dtype="float32", with_mtp=True)
    assert list(streamed.layers) == list(resident.layers)
    for name, layer in resident.layers.items():
        assert_same(layer, streamed.layers[name])


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_and_ends_of_rows_do_not_count(
    checkpoint: Path, ids: torch.Tensor, left: bool
) -> None:
    short = ids[1:, :7]
    alone = observed(checkpoint, {"input_ids": ids[:1]}, {"input_ids": short})
    pad = torch.zeros(1, LENGTH - 7, dtype=ids.dtype)
    row = torch.cat([pad, short] if left else [short, pad], dim=1)
    seen = torch.ones_like(ids)
    seen[1, : -7 if left else None] = 0
    if not left:
        seen[1, :7] = 1
    batch = {"input_ids": torch.cat([ids[:1], row]), "attention_mask": seen}
    if checkpoint.name == "deepseek_v32":  # its sparse attention sees padding
        with pytest.raises(UnsupportedModel, match="padded"):
            observed(checkpoint, batch)
        return
    together = observed(checkpoint, batch)
    assert int(together.layers[LAYER].tokens.sum()) == LENGTH - 1 + 6
    assert_same(together.layers[LAYER], alone.layers[LAYER], 1e-6)


def test_ends_of_packed_documents_do_not_count(checkpoint: Path, ids: torch.Tensor) -> None:
    row = ids[:1]
    alone = observed(checkpoint, {"input_ids": row[:, :5]}, {"input_ids": row[:, 5:]})
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])[None]
    batch = {"input_ids": row, "position_ids": positions}
    if checkpoint.name == "deepseek_v32":  # its sparse attention sees the other documents
        with pytest.raises(UnsupportedModel, match="packed"):
            observed(checkpoint, batch)
        return
    packed = observed(checkpoint, batch)
    assert int(packed.layers[LAYER].tokens.sum()) == LENGTH - 2
    assert_same(packed.layers[LAYER], alone.layers[LAYER], 1e-6)


def test_only_answers_count(checkpoint: Path, ids: torch.Tensor) -> None:
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, LENGTH - 3 :] = True
    stats = observed(checkpoint, {"input_ids": ids, "token_mask": mask})
    assert int(stats.layers[LAYER].tokens.sum()) == 4  # of three each, the last has no next token


@torch.no_grad()
def test_generation_observes_the_prompt(checkpoint: Path, ids: torch.Tensor) -> None:
    model = rd.load_model(checkpoint, dtype="float32", with_mtp=True)
    seen = torch.ones_like(ids)
    given = {"attention_mask": seen, "max_new_tokens": 3, "do_sample": False}
    with rd.observe(model) as observer:
        model.generate(ids, **given)
    assert int(observer.stats.layers[LAYER].tokens.sum()) == 2 * (LENGTH - 1)
    begun = model(input_ids=ids[:, :6], use_cache=True)
    with (
        rd.observe(model) as observer,
        pytest.raises(UnsupportedModel, match="continues 6 cached tokens"),
    ):
        observer(input_ids=ids[:, 6:], past_key_values=begun.past_key_values)


def test_observed_without_a_head(checkpoint: Path, ids: torch.Tensor) -> None:
    model = rd.load_model(checkpoint, dtype="float64", with_mtp=True)
    with rd.observe(model.model) as observer:
        observer(input_ids=ids)
    whole = observed(checkpoint, {"input_ids": ids}).layers[LAYER]
    assert_same(observer.stats.layers[LAYER.removeprefix("model.")], whole)


def test_only_observed(checkpoint: Path, ids: torch.Tensor) -> None:
    model = rd.load_model(checkpoint, dtype="float32", with_mtp=True)
    says = r"layers\.3 is for multi-token prediction and can only be observed"
    with pytest.raises(UnsupportedModel, match=says):
        rd.observe_vectors(model)
    with pytest.raises(UnsupportedModel, match=says), rd.masked_experts(model, {LAYER: range(6)}):
        pass


@pytest.mark.parametrize(
    ("name", "fields", "like", "says"),
    [
        ("glm_moe_dsa", {}, "model.layers.2.", "how models of type glm_moe_dsa run them"),
        ("glm4_moe_lite", {}, "model.layers.2.", "config.json counts 0 of them"),
        ("glm4_moe", {"num_nextn_predict_layers": 2}, "model.layers.2.", "counts 2 of them"),
        ("glm4_moe", {"num_nextn_predict_layers": 1}, "", r"no tensor .*3\.enorm\.weight"),
    ],
    ids=["type", "none", "two", "tensors"],
)
def test_what_cannot_be_run_is_refused(
    tmp_path: Path, name: str, fields: dict[str, Any], like: str, says: str
) -> None:
    saved.save(name, tmp_path / "model")
    if like:
        add_layer(tmp_path / "model", like, MTP, own_tensors())
    saved.change_config(tmp_path / "model", **fields)
    with pytest.raises(UnsupportedModel, match=says):
        rd.load_model(tmp_path / "model", with_mtp=True)
    with pytest.raises(UnsupportedModel, match=says):
        rd.observe_streamed(tmp_path / "model", [{}], with_mtp=True)


def test_not_on_several_devices(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="device_map 'cpu' is not together with with_mtp"):
        rd.load_model(checkpoint, with_mtp=True, device_map="cpu")
