"""Folders of Gram matrices: what is written is read, merged, resumed, or refused with one error."""

import json
import shutil

import pytest
import torch

import reap_driver as rd
import reap_kernels as rk
from reap_driver.files import gram_folder
from reap_kernels.errors import DataError

EXPERTS, WIDTH = 3, 5
LAYERS = ["layers.0.mlp.experts", "layers.1.mlp.experts"]
FACTS = {"model": {"model_type": "made_up", "config_digest": "a"}, "data": [{"tokens": 4}]}


def sums_of(seed: int) -> rk.LayerGram:
    """Sums of a few random rows, with rubbish above the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    sums = rk.LayerGram(EXPERTS, WIDTH)
    rows = torch.randn(EXPERTS, 7, WIDTH, generator=generator)
    sums.gram.copy_((rows.mT @ rows).tril() + torch.ones(WIDTH, WIDTH).triu(1) * 99)
    sums.first.copy_(rows.double().sum(dim=1))
    sums.weight.fill_(7.0)
    sums.count.fill_(7)
    return sums


def written(folder, seeds, provenance=FACTS):
    writer = rd.GramWriter(folder, LAYERS)
    for name, seed in zip(LAYERS, seeds, strict=False):
        writer.put(name, sums_of(seed))
    return writer.finish(provenance)


def same(first: rk.LayerGram, second: rk.LayerGram) -> bool:
    lower = [torch.equal(first.gram.tril(), second.gram.tril())]
    return all(
        lower
        + [torch.equal(a, b) for a, b in zip(first.packed()[1:], second.packed()[1:], strict=True)]
    )


def test_what_is_written_is_read(tmp_path) -> None:
    made = written(tmp_path / "sums", [1, 2])
    found = rd.GramFolder.open(tmp_path / "sums")
    assert list(found.layers) == LAYERS == list(made.layers)
    assert found.provenance == FACTS
    for name, seed in zip(LAYERS, [1, 2], strict=True):
        assert same(found.get(name), sums_of(seed))
        assert torch.equal(found.get(name).second(1), sums_of(seed).second(1))
    assert not (tmp_path / "sums.partial").exists()
    triangles = 4 * len(LAYERS) * EXPERTS * WIDTH * (WIDTH + 1) // 2
    assert triangles < found.nbytes < triangles + 4096


def test_a_folder_appears_when_it_is_complete_and_replaces_an_older_one(tmp_path) -> None:
    written(tmp_path / "sums", [1, 2])
    writer = rd.GramWriter(tmp_path / "sums", LAYERS)
    writer.put(LAYERS[0], sums_of(3))
    assert same(rd.GramFolder.open(tmp_path / "sums").get(LAYERS[0]), sums_of(1))
    again = writer.finish(FACTS)
    assert list(again.layers) == LAYERS[:1]
    assert same(again.get(LAYERS[0]), sums_of(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sums"]


def test_a_writer_goes_on_from_files_of_its_own_run(tmp_path) -> None:
    first = rd.GramWriter(tmp_path / "sums", LAYERS, of="this run")
    first.put(LAYERS[0], sums_of(1))
    other = rd.GramWriter(tmp_path / "sums", LAYERS, of="another run")
    assert not other.done(LAYERS[0])
    assert other.get_packed(LAYERS[0]) is None
    again = rd.GramWriter(tmp_path / "sums", LAYERS, of="this run")
    assert again.done(LAYERS[0])
    assert not again.done(LAYERS[1])
    again.put(LAYERS[1], sums_of(2))
    assert same(again.finish(FACTS).get(LAYERS[0]), sums_of(1))


def test_two_observations_add(tmp_path) -> None:
    one, two = (written(tmp_path / name, seeds) for name, seeds in (("a", [1, 2]), ("b", [3, 4])))
    both = one.merge(two, tmp_path / "both")
    assert same(both.get(LAYERS[1]), sums_of(2).merge_(sums_of(4)))
    assert both.provenance["data"] == [{"tokens": 4}, {"tokens": 4}]
    other = written(tmp_path / "c", [1, 2], {"model": {"model_type": "another"}})
    with pytest.raises(DataError, match="cannot merge Gram folders: model_type is 'another' there"):
        one.merge(other, tmp_path / "refused")
    fewer = written(tmp_path / "d", [1])
    with pytest.raises(DataError, match=r"neurons of layers.1.mlp.experts are \(3, 5\) in"):
        one.merge(fewer, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def damaged(folder, how: str) -> None:
    """Damages a folder."""
    first, second = (folder / f"gram-{number:04}.safetensors" for number in range(2))
    if how == "head":
        (folder / "gram.json").unlink()
    elif how == "gone":
        first.unlink()
    elif how == "bit":
        content = bytearray(first.read_bytes())
        content[-3] ^= 1
        first.write_bytes(content)
    elif how == "swapped":
        shutil.copy(second, first)
    elif how == "edited":
        content = json.loads((folder / "gram.json").read_text())
        content["layers"][0]["experts"] = 4
        (folder / "gram.json").write_text(json.dumps(content))
    else:
        raise ValueError(how)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("head", r"is missing, or still being written; make one with"),
        ("gone", r"lacks the file 'gram-0000.safetensors' of layers.0.mlp.experts"),
        ("bit", r"gram-0000.safetensors is damaged: its content has another digest"),
        ("swapped", r"gram-0000.safetensors is not the one that gram.json names for layers.0"),
        ("edited", r"gram.json is damaged: its content has another digest"),
    ],
)
def test_damage_is_named(tmp_path, how, text) -> None:
    written(tmp_path / "sums", [1, 2])
    damaged(tmp_path / "sums", how)
    with pytest.raises(DataError, match=text):
        rd.GramFolder.open(tmp_path / "sums").get(LAYERS[0])


def test_missing_folders_and_layers_are_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"Gram folder .*nowhere is missing; make one with"):
        rd.GramFolder.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no Gram matrices of layers.9"):
        written(tmp_path / "sums", [1, 2]).get("layers.9")
    with pytest.raises(DataError, match="'layers' has 0 entries"):
        rd.GramWriter(tmp_path / "none", LAYERS).finish(FACTS)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("count", torch.full((EXPERTS,), -1), "has a count outside 0 to"),
        ("weight", torch.full((EXPERTS,), torch.nan, dtype=torch.float64), "has weight with NaN"),
        ("first", torch.zeros(EXPERTS, WIDTH), "has first of torch.float32"),
        ("gram", torch.zeros(EXPERTS, 3), "has gram of torch.float32 .3, 3.; expected"),
    ],
)
def test_numbers_that_no_observation_leaves_are_named(tmp_path, name, value, text) -> None:
    writer = rd.GramWriter(tmp_path / "sums", LAYERS)
    writer.put_packed(LAYERS[0], {**gram_folder.packed(sums_of(1)), name: value})
    with pytest.raises(DataError, match=text):
        writer.finish(FACTS).get(LAYERS[0])
