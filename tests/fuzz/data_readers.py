"""Readers of calibration data and recipes."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from reap_driver.data.images import decode
from tests.driver.images import tiny
from tests.fuzz.campaign import Nonsense, Reader
from tests.fuzz.changes import json_value, raw_bytes, text_lines
from tests.fuzz.inputs import encoded, in_file
from tests.fuzz.world import World

_RECORDS = (
    {"text": "some text"},
    {"input_ids": [3, 4, 5, 6, 7], "attention_mask": [0, 1, 1, 1, 1]},
    {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"messages": '[{"role": "user", "content": [{"type": "text", "text": "a"}]}]'},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "do", "input": "this", "output": "done"},
    {"prompt": "p", "completion": "c"},
    {
        "query": "q",
        "tools": '[{"name": "f", "description": "d", "parameters": {}}]',
        "answers": '[{"name": "f", "arguments": {"a": 1}}]',
    },
    {
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "because",
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
                ],
            },
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
)


def _images(world: World) -> Iterable[Reader]:
    """Records with images, and files of images."""
    model, kinds = world.folder / "sees", ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
    tiny.write(model, tiny.QWEN)
    use = partial(encoded, world, model, vocab=tiny.VOCAB)
    part = {"type": "image", "image": tiny.data_url(tiny.png())}
    url = {"type": "image_url", "image_url": {"url": part["image"]}}
    records = [
        {"messages": [tiny.says("see", part)]},
        {"messages": [tiny.says("see", url), tiny.says("yes", role="assistant")]},
        {"messages": [{"role": "user", "content": "<image>see"}], "images": [part["image"]]},
    ]
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    yield Reader("images", lines, text_lines, in_file(world.folder / "inputs" / "i.jsonl", use), 2)
    files = [tiny.png(kind=kind) for kind in kinds]
    yield Reader("image", files, raw_bytes, lambda content: decode(content, "here") and None, 2)


def data(world: World) -> Iterable[Reader]:
    """Calibration data."""
    new = world.folder / "inputs"
    use = partial(encoded, world, world.model)
    every = [json.dumps(record).encode() + b"\n" for record in _RECORDS]
    yield Reader("records", every, text_lines, in_file(new / "r.jsonl", use), 6)
    joined = b"".join(every[:1] * 20)
    for suffix, compress in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        path = new / f"r.jsonl.{suffix}"
        yield Reader(f"records .{suffix}", [compress(joined)], raw_bytes, in_file(path, use))
    array = b"[" + b", ".join(every) + b"]"
    yield Reader("records .json", [array], json_value, in_file(new / "r.json", use), 2)
    yield Reader("records .json bytes", [array], raw_bytes, in_file(new / "b.json", use), 2)
    table = b'text,id\n"a ""b""\nc",1\n\nd,2\n'
    yield Reader("records .csv", [table], raw_bytes, in_file(new / "r.csv", use), 2)
    yield from _images(world)
    yield Reader("text", [b"A text.\n\nOf lines.\n"], raw_bytes, in_file(new / "t.txt", use))
    yield Reader("parquet", list(_parquet()), raw_bytes, in_file(new / "r.parquet", use), 2)
    recipe = [{"source": str(world.data), "group": "code", "samples": 3, "tokens": "2k"}]
    valid = [
        json.dumps({"description": "a mix", "sources": recipe}).encode(),
        json.dumps([{**recipe[0], "tools": [{"name": "f", "parameters": {}}]}]).encode(),
    ]
    yield Reader("recipe .json", valid, json_value, in_file(new / "r.json", _use_recipe), 2)
    yield Reader("recipe .yaml", valid, json_value, in_file(new / "r.yaml", _use_recipe), 2)
    lines = [line.replace("DATA", str(world.data)).encode() for line in _YAML]
    use_lines = in_file(new / "l.yaml", _use_recipe)
    yield Reader("recipe of lines", lines[:2], raw_bytes, use_lines, 2, odd=lines[2:])


_YAML = (
    "- source: DATA\n  group: code\n  samples: 3\n",
    "description: d\nsources:\n- source: >-\n    DATA\n  tokens: 2M\n",
    "sources: &a\n  - {source: DATA, tokens: 2M}\n  - *a\n",
    "- source: DATA\n  date: 2024-13-01\n",
)


def _parquet() -> Iterable[bytes]:
    import pyarrow
    import pyarrow.parquet

    for rows in ([{"text": "a"}, {"text": "b"}], [{"input_ids": [1, 2, 3]}] * 3):
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        yield sink.getvalue()


def _use_recipe(path: Path) -> None:
    from reap_driver.workflow.recipes import load_recipe

    for source in load_recipe(path).sources:
        if source.samples is not None and source.samples < 1:
            raise Nonsense("a recipe draws less than one record")
