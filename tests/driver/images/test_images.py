"""Images in calibration data: from records to statistics, and errors."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import reap_driver as rd
from reap_driver.compat.model_config import load_config
from reap_driver.data.batches import PackedBatches
from reap_driver.data.encode import Encoder
from reap_driver.data.image_inputs import ImageInputs
from reap_driver.data.packing import PackedSource, pack
from reap_driver.data.source import DataSource
from reap_kernels.errors import DataError
from tests.driver.cli.conftest import write_model
from tests.driver.images import tiny
from tests.driver.images.tiny import ERNIE, QWEN, data_url, png, says

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints, and one that takes only text; tests do not change them."""
    root = tmp_path_factory.mktemp("images")
    for name in (QWEN, ERNIE):
        tiny.write(root / name, name)
    write_model(root / "text", "qwen3_moe")
    (root / "text" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    return {name: root / name for name in (QWEN, ERNIE, "text")}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes records to a file, and `a.png` beside it; returns the file."""

    def to_file(*records: dict[str, Any], name: str = "data.jsonl") -> Path:
        (tmp_path / "a.png").write_bytes(png())
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return to_file


def packed(folder: Path, data: Path, seq_len: int = 64, **options: Any) -> PackedSource:
    encoder = Encoder(folder, load_config(folder))
    return pack(DataSource.parse(str(data)), encoder, seq_len=seq_len, **options)


IMAGE = {"type": "image", "path": "a.png"}
TEXT = {"messages": [says("a text alone")]}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [says("see", IMAGE)]},
        {"messages": [says("see", {"type": "image", "image": "a.png"})]},
        {"messages": [says("see", {"type": "image", "url": "a.png"})]},
        {"messages": [says("see", {"type": "image", "base64": data_url(png()).partition(",")[2]})]},
        {"messages": [says("see", {"type": "image_url", "image_url": {"url": data_url(png())}})]},
        {"messages": [says("see", {"type": "image_url", "image_url": "a.png"})]},
        {"messages": [says("see", {"type": "image"})], "images": ["a.png"]},
        {"messages": [says("see", {"type": "image"})], "image": data_url(png())},
        {"messages": [{"role": "user", "content": "see<image>"}], "images": ["a.png"]},
        {"conversations": [{"from": "human", "value": "see<image>"}], "image": "a.png"},
        {"prompt": [says("see", IMAGE)], "completion": ""},
    ],
    ids=lambda record: "+".join(sorted(record)),
)
def test_images_however_they_are_given(
    record: dict[str, Any], folders: dict[str, Path], write: Write
) -> None:
    """The same tokens and pixels, however an image is given."""
    source = packed(folders[QWEN], write(record))
    [one] = source.image_inputs.values()
    wanted = packed(folders[QWEN], write({"messages": [says("see", IMAGE)]}, name="w.jsonl"))
    [other] = wanted.image_inputs.values()
    assert one.images == other.images == [png()]
    made, expected = one.inputs(), other.inputs()
    assert made.keys() == expected.keys()
    assert torch.equal(made["pixel_values"], expected["pixel_values"])
    # 24 x 16 pixels are 6 x 4 patches of 4, merged by 2 x 2.
    assert made["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert int((made["input_ids"] == 259).sum()) == 6
    assert source.unused == []


def test_images_in_parquet_and_of_the_hub(folders: dict[str, Path], tmp_path: Path) -> None:
    """Images as bytes in columns, as `datasets` writes them, read by Arrow and by `datasets`."""
    datasets = pytest.importorskip("datasets")
    from reap_driver.data.hub import _undecoded

    rows = {
        "messages": [[{"role": "user", "content": "see<image>and<image>"}]],
        "images": [[{"bytes": png(1), "path": "x.png"}, {"bytes": png(2), "path": None}]],
    }
    features = {
        "messages": datasets.List(
            {"role": datasets.Value("string"), "content": datasets.Value("string")}
        ),
        "images": datasets.List(datasets.Image()),
    }
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(tmp_path / "data.parquet")
    [one] = packed(folders[QWEN], tmp_path / "data.parquet").image_inputs.values()
    assert one.images == [png(1), png(2)]
    given = _undecoded(table)[0]["images"]
    assert [image["bytes"] for image in given] == [png(1), png(2)]


@pytest.mark.parametrize("packing", ["concat", "isolated", "none"])
def test_a_record_with_images_is_a_sequence_and_a_batch(
    packing: Any, folders: dict[str, Path], write: Write
) -> None:
    """Texts around it are packed as usual, and no token is added to it."""
    seen = {"messages": [says("look ", IMAGE, " twice ", {**IMAGE, "path": "a.png"})]}
    data = write(TEXT, TEXT, seen, seen, TEXT, TEXT)
    source = packed(folders[QWEN], data, packing=packing)
    assert source.records == 6
    assert len(source.image_inputs) == 2
    batches = PackedBatches([source], [4], folds=2)
    found = [batches.inputs(number) for number in range(len(batches))]
    with_pixels = [inputs for inputs in found if "pixel_values" in inputs]
    assert len(with_pixels) == 2
    for inputs in with_pixels:
        assert inputs["input_ids"].shape[0] == 1
        assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]] * 2
        assert "position_ids" not in inputs
    begins = list(source.image_inputs)
    for begin in begins:
        row = source.bounds.index(begin)
        ids = source.ids[begin : source.bounds[row + 1]]
        assert torch.equal(ids.long(), source.image_inputs[begin].inputs()["input_ids"][0])
    total = sum(int(i.get("attention_mask", torch.ones_like(i["input_ids"])).sum()) for i in found)
    assert total == source.tokens
    assert source.provenance()["images"] == 4


def test_digests_are_of_pixels_too(folders: dict[str, Path], write: Write) -> None:
    digests = set()
    for seed in (0, 1):
        part = {"type": "image", "image": data_url(png(seed))}
        source = packed(folders[QWEN], write({"messages": [says("see", part)]}))
        digests.add(source.provenance()["digest"])
    assert len(digests) == 2


@pytest.mark.parametrize("name", [QWEN, ERNIE])
def test_observed_as_the_model_itself_runs(
    name: str, folders: dict[str, Path], write: Write
) -> None:
    """Every token counts once; tokens of images count for the vision experts if there are any."""
    records = [{"messages": [says("what is ", IMAGE, "?"), says("a picture", role="assistant")]}]
    source = packed(folders[name], write(*records, TEXT))
    batches = PackedBatches([source], [1])
    model = rd.load_model(folders[name])
    with rd.observe(model) as obs:
        for number in range(len(batches)):
            inputs = batches.inputs(number)
            out = obs(**inputs)
            if "pixel_values" in inputs:
                image_inputs, logits = inputs, out.logits
    with torch.no_grad():
        plain = model(**image_inputs, use_cache=False, logits_to_keep=1).logits
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
    stats = obs.stats
    assert "unobserved" not in stats.provenance
    text = [int(layer.tokens.sum()) for n, layer in stats.layers.items() if "vision" not in n]
    vision = [int(layer.tokens.sum()) for n, layer in stats.layers.items() if "vision" in n]
    if name == QWEN:
        assert set(text) == {source.tokens}
        return
    shown = 6 + 2  # an image's tokens, and those that begin and end it
    assert (set(text), set(vision)) == ({source.tokens - shown}, {shown})


@pytest.mark.parametrize("name", [QWEN, ERNIE])
def test_streamed_as_resident(name: str, folders: dict[str, Path], write: Write) -> None:
    source = packed(folders[name], write({"messages": [says("what is ", IMAGE, "?")]}, TEXT))
    batches = PackedBatches([source], [1])
    given: list[dict[str, Tensor]] = [batches.inputs(n) for n in range(len(batches))]
    model = rd.load_model(folders[name])
    with rd.observe(model) as obs:
        for inputs in given:
            obs(**inputs)
    streamed = rd.observe_streamed(folders[name], given)
    assert list(streamed.layers) == list(obs.stats.layers)
    for layer, stats in obs.stats.layers.items():
        for field, value in stats.fields().items():
            assert torch.equal(value, streamed.layers[layer].fields()[field]), (layer, field)


def large(pixels: int) -> bytes:
    """A large white image in a small file."""
    out = io.BytesIO()
    Image.new("1", (pixels, pixels)).save(out, "PNG")
    return out.getvalue()


def too_large(pixels: int) -> bytes:
    """An image whose header states that size, which is refused before pixels are read."""
    small = png()
    header = b"IHDR" + struct.pack(">II", pixels, pixels) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def part(given: Any) -> dict[str, Any]:
    return {"messages": [says("see", {"type": "image", "image": given})]}


@pytest.mark.parametrize(
    ("record", "says_so"),
    [
        (part("missing.png"), "'missing.png', which is no file in"),
        (part("../a.png"), "outside the folder of the data"),
        (part("/etc/hostname"), "outside the folder of the data"),
        (part("link.png"), "outside the folder of the data"),
        (part("a\0b"), "no path|no file"),
        (part("x" * 5000), "no path|no file"),
        (part("https://example.org/a.png"), "nothing is downloaded"),
        (part("file:///etc/hostname"), "nothing is downloaded"),
        (part("data:text/html;base64,AAAA"), "give data:image"),
        (part("data:image/png;base64,%%%"), "is no base64"),
        (part(data_url(b"no image")), "cannot be decoded"),
        (part(data_url(png()[:60])), "cannot be decoded"),
        (part(data_url(too_large(12000))), r"12000 x 12000 pixels, more than"),
        (part(data_url(too_large(20000))), "cannot be decoded .*decompression bomb"),
        (
            {"messages": [says(*[part(data_url(large(7000)))["messages"][0]["content"][1]] * 2)]},
            "brings them to 98000000 pixels",
        ),
        (part(3), "an image is 3; give a path"),
        (part({"bytes": "text"}), "give a path, a data URL, or bytes"),
        ({"messages": [says("see", {"type": "image", "image": "a", "url": "b"})]}, "give one of"),
        ({"messages": [says("see", {"type": "image"})]}, "0 images beside .* 1 places"),
        ({"messages": [says("see")], "images": ["a.png"]}, "1 images beside .* 0 places"),
        ({"messages": [says("see", {"type": "video", "video": "a"})]}, "type 'video'"),
        ({"messages": [says(*[IMAGE] * 12)]}, "tokens with its images, and a sequence 64"),
    ],
)
def test_bad_images_are_one_error_by_line(
    record: dict[str, Any], says_so: str, folders: dict[str, Path], write: Write, tmp_path: Path
) -> None:
    data = write(TEXT, record)
    (tmp_path / "link.png").symlink_to("/etc/hostname")
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*({says_so})") as caught:
        packed(folders[QWEN], data)
    assert "\n" not in str(caught.value)
    assert packed(folders[QWEN], data, skip_bad=True).records == 1


def test_models_without_a_processor(folders: dict[str, Path], write: Write) -> None:
    data = write({"messages": [{"role": "user", "content": "see"}]}, {"messages": [says(IMAGE)]})
    with pytest.raises(DataError, match=r"data\.jsonl:2: has images, (but|and) .*processor"):
        packed(folders["text"], data)
    assert packed(folders["text"], data, skip_bad=True).records == 1


def test_a_processor_that_fails_is_one_error(folders: dict[str, Path]) -> None:
    """If a processor was loaded without its part for videos, the error says so."""

    def fail(**_: Any) -> None:
        raise AttributeError("'NoneType' object has no attribute 'merge_size'")

    whole = ImageInputs("see", [png()], "here", fail)
    with pytest.raises(DataError, match=r"here: the processor .*merge_size.*; correct") as caught:
        whole.inputs()
    assert "torchvision" not in str(caught.value)
    fail.video_processor = None  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="or install torchvision"):
        whole.inputs()


def test_answers_beside_images_cannot_be_told_apart(folders: dict[str, Path], write: Write) -> None:
    data = write({"messages": [says("see", IMAGE), says("yes", role="assistant")]})
    encoder = Encoder(folders[QWEN], load_config(folders[QWEN]), answers_only=True)
    with pytest.raises(DataError, match="leave out `answers_only=True`"):
        pack(DataSource.parse(str(data)), encoder, seq_len=64)


def test_budgets_leave_out_what_does_not_fit(folders: dict[str, Path], write: Write) -> None:
    record = {"messages": [says("see", IMAGE)]}
    data = write(record, record, record)
    one = packed(folders[QWEN], data).tokens // 3
    source = packed(folders[QWEN], Path(f"{data}:{one * 2 + 3}tok"))
    assert (source.tokens, len(source.image_inputs), source.records) == (2 * one, 2, 2)


def test_an_image_that_no_text_is_about(folders: dict[str, Path], write: Write) -> None:
    """`image` is a container's name in data of coding agents: the field is unused."""
    source = packed(folders[QWEN], write({**TEXT, "image": "docker.io/library/python:3.12"}))
    assert not source.image_inputs
    assert source.unused == ["image"]


def test_text_alone_loads_no_processor(
    folders: dict[str, Path], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nobody needs it")

    monkeypatch.setattr("reap_driver.data.image_inputs.load_processor", refuse)
    assert not packed(folders[QWEN], write(TEXT)).image_inputs
