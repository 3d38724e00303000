"""Every reader of what comes from elsewhere, with valid inputs and the use of an accepted one.

Most are called as a user calls them, by the command line in this process, so that what is accepted
is also planned from, drawn or written with.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from random import Random
from unittest import mock

import torch
from safetensors import SafetensorError, safe_open

from reap_driver.calibration.images import decode
from reap_driver.journal import Journal
from reap_driver.journal import read as read_journal
from reap_driver.report.comparison import comparison_table, read_comparison
from reap_driver.search.state import SearchState
from reap_driver.search.state import read as read_search
from reap_driver.streaming.state import State
from reap_driver.streaming.store import read_state, write_state
from reap_kernels import SaliencyStats
from reap_kernels.tuning import CONFIGS, Launch, Table
from tests.driver.images import tiny
from tests.driver.published.reduce import small_config
from tests.fuzz.campaign import Nonsense, Reader
from tests.fuzz.changes import container, json_value, raw_bytes, text_lines
from tests.fuzz.world import World, command


def readers(world: World) -> list[Reader]:
    """All of them."""
    return [
        *_formats(world),
        *_containers(world),
        *_checkpoints(world),
        *_data(world),
        *_words_and_variables(world),
    ]


def _in_file(path: Path, use: Callable[[Path], None]) -> Callable[[bytes], None]:
    """Writes each input to `path` and hands that on."""

    def read(content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        use(path)

    return read


def _formats(world: World) -> Iterable[Reader]:
    """Our own formats."""
    new = world.folder / "formats"
    yield Reader(
        "plan",
        [world.plan.read_bytes()],
        json_value,
        _in_file(new / "plan.json", partial(_use_plan, world)),
        4,
    )
    journal = Journal(new / "journal", {"model": "m", "seed": 0})
    journal.write(1, SaliencyStats.load(world.stats), seconds=1.0)
    content = (new / "journal/journal.json").read_bytes()
    yield Reader(
        "journal", [content], json_value, _in_file(journal.folder / "journal.json", _use_journal), 2
    )
    search = SearchState(new / "search.json", {"model": "m", "seed": 0})
    search.write({(1, 2): 0.5, (2, 1): 0.25}, 1.0)
    yield Reader(
        "search state",
        [search.path.read_bytes()],
        json_value,
        _in_file(search.path, _use_search),
        2,
    )
    tables = [path.read_bytes() for path in sorted(CONFIGS.glob("*.json"))]
    yield Reader("launch table", tables, json_value, _in_file(new / "table.json", _use_table), 2)
    yield Reader(
        "comparison",
        [world.comparison],
        json_value,
        _in_file(new / "comparison.json", _use_comparison),
    )
    for option, valid in (
        ("--layer-ratios", b'{"0": 0.25, "1": 0.5}'),
        ("--protect", b'{"0": [1, 2], "1": [3]}'),
    ):
        yield Reader(
            f"plan {option}",
            [valid, valid.replace(b'"0"', b'"*"')],
            json_value,
            _in_file(new / "layers.json", partial(_use_layer_file, world, option)),
        )


def _use_plan(world: World, path: Path) -> None:
    """Applies it: everything a plan says ends in the checkpoint or its card."""
    out = world.folder / "applied"
    shutil.rmtree(out, ignore_errors=True)
    command("apply", world.model, path, "--out", out)
    plan = json.loads(path.read_bytes().decode("utf-8-sig"))
    written = json.loads((out / "config.json").read_text())
    counts = {len(layer["kept"]) for layer in plan["layers"].values()}
    if {
        written["num_experts"] if "num_experts" in written else written["num_local_experts"]
    } != counts:
        raise Nonsense("a plan was applied with another count than it says")


def _use_journal(path: Path) -> None:
    content = read_journal(path.parent)
    Journal(path.parent, content["run"])
    if not 0 <= content["position"] < 2**40 or content["seconds"] < 0:
        raise Nonsense("a journal's position or time is out of range")
    if Path(content["stats"]).name != content["stats"]:
        raise Nonsense("a journal names a file outside its folder")


def _use_search(path: Path) -> None:
    saved = read_search(path)
    for removals, fitness in saved.evaluated.items():
        if any(number < 0 for number in removals) or not abs(fitness) < float("inf"):
            raise Nonsense("a state of a search holds removals or a fitness out of range")


def _use_table(path: Path) -> None:
    for entry in Table.load(path).entries:
        entry.covers("gate_up", "half", 768, 100.0)
        launch = entry.launch
        if launch is not None and not _sane(launch):
            raise Nonsense(f"launch {launch} cannot be launched")


def _sane(launch: Launch) -> bool:
    return (
        max(launch.block_m, launch.block_n, launch.block_k) <= 1024
        and launch.num_warps <= 32
        and launch.num_stages <= 16
        and launch.group_m <= 2**16
    )


def _use_comparison(path: Path) -> None:
    comparison_table(read_comparison(path))


def _use_layer_file(world: World, option: str, path: Path) -> None:
    out = world.folder / "layers-plan.json"
    command("plan", world.stats, "--ratio", "0.5", option, path, "--out", out, "--overwrite")


def _containers(world: World) -> Iterable[Reader]:
    """Files of tensors."""
    new = world.folder / "containers"
    yield Reader(
        "statistics",
        [world.stats.read_bytes()],
        container,
        _in_file(new / "stats.safetensors", partial(_use_stats, world)),
        3,
    )
    yield Reader(
        "statistics without digest",
        [world.stats.read_bytes()],
        container,
        _unsealed(_in_file(new / "unsealed.safetensors", partial(_use_stats, world))),
        3,
    )
    yield Reader(
        "masks",
        [world.masks.read_bytes()],
        container,
        _in_file(new / "masks.safetensors", partial(_use_masks, world)),
        2,
    )
    new.mkdir(parents=True, exist_ok=True)
    write_state(
        new / "state.safetensors", State.of(0, (torch.ones(2, 3), [torch.ones(4)]), {"/0": {}})
    )
    yield Reader(
        "state between layers",
        [(new / "state.safetensors").read_bytes()],
        container,
        _in_file(new / "state.safetensors", lambda path: _use_state(read_state(path))),
    )


def _unsealed(read: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """Reads as if every digest fitted, so that what it guards is checked for itself."""

    def unsealed(content: bytes) -> None:
        with mock.patch("reap_kernels.documents._digest", lambda head, _: head.get("digest", "")):
            read(content)

    return unsealed


def _use_stats(world: World, path: Path) -> None:
    out = world.folder / "stats-plan.json"
    command("plan", path, "--ratio", "0.5", "--out", out, "--overwrite")


def _use_masks(world: World, path: Path) -> None:
    from reap_driver.checkpoint.masks import load_masks

    for kept in load_masks(path).values():
        if not kept or any(not 0 <= expert < 8 for expert in kept):
            raise Nonsense("masks keep no expert, or one that no layer has")


def _use_state(state: State) -> None:
    state.output()
    state.changes()
    if sum(tensor.untyped_storage().nbytes() for tensor in state.tensors) > 10**6:
        raise Nonsense("a state is larger than its file")


def _checkpoints(world: World) -> Iterable[Reader]:
    """A checkpoint's own files, as `apply` and `observe --dry-run` read them."""
    model = world.model_copy("spoiled")
    shard = sorted(model.glob("*.safetensors"))[0]
    yield Reader("shard", [shard.read_bytes()], container, _spoiled(world, model, shard, _open), 3)
    index = model / "model.safetensors.index.json"
    yield Reader("index", [index.read_bytes()], json_value, _spoiled(world, model, index, _open), 2)
    config = model / "config.json"
    yield Reader(
        "config.json",
        [config.read_bytes()],
        json_value,
        _spoiled(world, model, config, _dry_run),
        4,
    )
    others = [json.dumps(small_config(name)).encode() for name in _ARCHITECTURES]
    alone = _in_file(world.folder / "configs/config.json", _estimate)
    yield Reader("config.json alone", others, json_value, alone, 4)
    for name, valid in _BESIDE.items():
        file = model / name
        yield Reader(
            name,
            [valid],
            json_value if name.endswith("json") else raw_bytes,
            _spoiled(world, model, file, _apply),
        )
    for name in ("tokenizer_config.json", "tokenizer.json"):
        file = model / name
        yield Reader(name, [file.read_bytes()], json_value, _spoiled(world, model, file, _tokenize))
    template = model / "chat_template.jinja"
    yield Reader(
        "chat template",
        [template.read_bytes(), *_TEMPLATES],
        raw_bytes,
        _spoiled(world, model, template, _converse),
    )


_ARCHITECTURES = (
    "deepseek-v3.2",
    "ernie-4.5-21b-a3b",
    "gemma-4-26b-a4b",
    "glm-4.5-air",
    "gpt-oss-120b",
    "kimi-linear-48b-a3b",
    "llama-4-scout-17b-16e",
    "mixtral-8x7b",
    "qwen3.5-397b-a17b",
)
_BESIDE = {
    "generation_config.json": b'{"max_length": 32, "eos_token_id": [1, 2], "temperature": 0.5}',
    "quantization_config.json": (
        b'{"bits": 4, "group_size": 16, "quant_method": "auto-round", "extra_config":'
        b' {"model.layers.0.mlp.experts.3.up_proj": {"bits": 8}, "model.layers.1.mlp.gate":'
        b' {"bits": 16}}, "block_name_to_quantize": "model.layers"}'
    ),
    "params.json": b'{"dim": 32, "moe": {"num_experts": 8, "num_experts_per_tok": 3}}',
    "README.md": b"---\nlicense: mit\ndate: 2024-12-01\ntags: [moe, text]\n---\n# A model\n",
}
_TEMPLATES = (
    b"{{ messages[0]['content'] }}{% for i in range(3) %}{{ i }}{% endfor %}",
    b"{% macro f(x) %}{{ x }}{% endmacro %}{{ f(messages | length) }}{{ 4 // 2 }}",
    b"{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}x",
)


def _spoiled(
    world: World, model: Path, file: Path, use: Callable[[World, Path], None]
) -> Callable[[bytes], None]:
    """Replaces a file of the model while an input is read."""
    before = file.read_bytes() if file.exists() else None

    def read(content: bytes) -> None:
        file.write_bytes(content)
        try:
            use(world, model)
        finally:
            if before is None:
                file.unlink()
            else:
                file.write_bytes(before)

    return read


def _open(world: World, model: Path) -> None:
    """What the checkpoint's reader accepts, the safetensors library accepts too."""
    from reap_driver.checkpoint.source import open_source

    source = open_source(model)
    try:
        for shard in source.shards:
            with safe_open(shard.path, "pt") as file:
                names = set(file.keys())
            if names != set(shard.tensors):
                raise Nonsense("the safetensors library finds other tensors")
    except SafetensorError as error:
        raise Nonsense(f"the safetensors library refuses it: {error}") from error


def _dry_run(world: World, model: Path) -> None:
    found = command("observe", model, "--data", world.data, "--seq-len", 16, "--dry-run")
    _check_estimate(found, json.loads((model / "config.json").read_bytes()))


def _estimate(path: Path) -> None:
    """A configuration without weights."""
    found = command("observe", path, "--dry-run", "--tokens", "1M", "--dtype", "bfloat16")
    _check_estimate(found, json.loads(path.read_bytes()))


_SIZES = (
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "vocab_size",
)


def _check_estimate(found: object, config: dict[str, object]) -> None:
    """Sizes that no model has lead to no estimate."""
    if "NaN" in json.dumps(found) or "Infinity" in json.dumps(found):
        raise Nonsense("an estimate is not a number")
    for name in _SIZES:
        size = config.get(name)
        if size is not None and (not isinstance(size, int) or not 0 < size < 10**8):
            raise Nonsense(f"a model with {name} {size!r:.30} was sized")


def _apply(world: World, model: Path) -> None:
    out = world.folder / "applied"
    shutil.rmtree(out, ignore_errors=True)
    command("apply", model, world.plan, "--out", out)


def _encoded(world: World, model: Path, data: Path, *more: object, vocab: int = 259) -> None:
    """Reads and tokenizes data as `observe` does; no model runs."""
    from reap_driver.calibration import DataSource, Encoder, pack
    from reap_driver.compat.models import load_config

    source = DataSource.parse(str(data))
    encoder = Encoder(model, load_config(model))
    packed = pack(source, encoder, seq_len=64)
    packed.provenance()
    if len(packed.ids) and not 0 <= int(packed.ids.min()) <= int(packed.ids.max()) < vocab:
        raise Nonsense("a token id is outside the vocabulary")


def _tokenize(world: World, model: Path) -> None:
    _encoded(world, model, world.data)


def _converse(world: World, model: Path) -> None:
    data = world.folder / "chat.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    _encoded(world, model, data)


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
    use = partial(_encoded, world, model, vocab=tiny.VOCAB)
    part = {"type": "image", "image": tiny.data_url(tiny.png())}
    url = {"type": "image_url", "image_url": {"url": part["image"]}}
    records = [
        {"messages": [tiny.says("see", part)]},
        {"messages": [tiny.says("see", url), tiny.says("yes", role="assistant")]},
        {"messages": [{"role": "user", "content": "<image>see"}], "images": [part["image"]]},
    ]
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    yield Reader("images", lines, text_lines, _in_file(world.folder / "inputs" / "i.jsonl", use), 2)
    files = [tiny.png(kind=kind) for kind in kinds]
    yield Reader("image", files, raw_bytes, lambda content: decode(content, "here") and None, 2)


def _data(world: World) -> Iterable[Reader]:
    """Calibration data."""
    new = world.folder / "inputs"
    use = partial(_encoded, world, world.model)
    every = [json.dumps(record).encode() + b"\n" for record in _RECORDS]
    yield Reader("records", every, text_lines, _in_file(new / "r.jsonl", use), 6)
    joined = b"".join(every[:1] * 20)
    for suffix, compress in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        path = new / f"r.jsonl.{suffix}"
        yield Reader(f"records .{suffix}", [compress(joined)], raw_bytes, _in_file(path, use))
    yield from _images(world)
    yield Reader("text", [b"A text.\n\nOf lines.\n"], raw_bytes, _in_file(new / "t.txt", use))
    yield Reader("parquet", list(_parquet()), raw_bytes, _in_file(new / "r.parquet", use), 2)
    recipe = [{"source": str(world.data), "group": "code", "samples": 3, "tokens": "2k"}]
    valid = [
        json.dumps({"description": "a mix", "sources": recipe}).encode(),
        json.dumps([{**recipe[0], "tools": [{"name": "f", "parameters": {}}]}]).encode(),
    ]
    yield Reader("recipe .json", valid, json_value, _in_file(new / "r.json", _use_recipe), 2)
    yield Reader("recipe .yaml", valid, json_value, _in_file(new / "r.yaml", _use_recipe), 2)
    lines = [line.replace("DATA", str(world.data)).encode() for line in _YAML]
    use_lines = _in_file(new / "l.yaml", _use_recipe)
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
    from reap_driver.calibration.recipe import load_recipe

    for source in load_recipe(path):
        if source.samples is not None and source.samples < 1:
            raise Nonsense("a recipe draws less than one record")


def _words_and_variables(world: World) -> Iterable[Reader]:
    """Words on the command line, and the environment."""
    yield Reader("command line", _WORDS, _words, partial(_call, world), 3)
    yield Reader("environment", _VARIABLES, _assigned, partial(_call_with, world))


_VARIABLES = (
    b"WORLD_SIZE=1",
    b"RANK=0",
    b"LOCAL_RANK=0",
    b"REAP_BACKEND=cpu",
    b"REAP_TUNING=",
    b"REAP_CPU_DTYPE=float32",
    b"REAP_SCRATCH_BYTES=1000000",
    b"REAP_CACHE_DIR=cache",
)


def _assigned(content: bytes, rng: Random) -> bytes:
    name = content.partition(b"=")[0]
    return name + b"=" + rng.choice([word for word in _ODD if "\0" not in word]).encode()


def _call_with(world: World, content: bytes) -> None:
    name, _, value = content.decode().partition("=")
    new = world.folder / "environment"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    words = (world.model, "--data", world.data, "--seq-len", 16, "--out", new / "stats.safetensors")
    with contextlib.chdir(new), mock.patch.dict(os.environ, {name: value}):
        command("observe", *words)


_WORDS = (
    b"plan STATS --out OUT --ratio 0.5 --criterion S(0,1,1)",
    b"plan STATS --out OUT --ratio 0.25 --allocation global --skip-first 1",
    b"plan STATS --out OUT --ratio 0.5 --weights data=1.0 --protect 0:1,2",
    b"plan STATS --out OUT --ratio 0.5 --protect super --criterion random:7",
    b"observe MODEL --dry-run --tokens 24M --seq-len 16 --batch-size 2 --folds 4",
    b"observe MODEL --dry-run --data code=DATA:7 --packing none --max-len 16",
    b"report STATS PLAN --out OUT",
)
_ODD = (
    "-1", "0", "1e999", "nan", "inf", "9" * 30, "x", "", "*", "0.5", "=", ":", ",", "S(9,9,9)",
    "S(9999,1,1)", "random:-1", "random:" + "9" * 30, "x" * 300, "\u00e9", "\x01", "../..", "0:1",
    "99:1", "0:-1", "data=nan", "data=-1", "data=0", "[", "]", "(", "code=DATA:0", "DATA:1e9tok",
    "DATA:" + "9" * 30, "DATA:-1", "0.999999999", "1e-300",
)  # fmt: skip


def _words(content: bytes, rng: Random) -> bytes:
    words = content.decode().split(" ")
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(1, len(words))
        if rng.random() < 0.8:
            words[at] = rng.choice(_ODD)
        elif rng.random() < 0.5:
            del words[at]
        else:
            words.insert(at, rng.choice(words))
    return " ".join(words).encode()


def _call(world: World, content: bytes) -> None:
    new = world.folder / "words/in/a/folder"  # outputs named by chance stay below the world's
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    known = {"STATS": world.stats, "OUT": new / "out", "MODEL": world.model, "PLAN": world.plan}
    words = [str(known.get(word, word)) for word in content.decode().split(" ")]
    with contextlib.chdir(new):
        command(*(word.replace("DATA", str(world.data)) for word in words))
