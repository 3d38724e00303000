"""Readers of a checkpoint's own files."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tests.driver.published.reduce import small_config
from tests.fuzz.campaign import Nonsense, Reader
from tests.fuzz.changes import container, json_value, raw_bytes
from tests.fuzz.inputs import encoded, in_file
from tests.fuzz.world import World, command


def checkpoints(world: World) -> Iterable[Reader]:
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
    alone = in_file(world.folder / "configs/config.json", _estimate)
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
    from reap_driver.files.checkpoint import open_checkpoint

    source = open_checkpoint(model)
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


def _tokenize(world: World, model: Path) -> None:
    encoded(world, model, world.data)


def _converse(world: World, model: Path) -> None:
    data = world.folder / "chat.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    encoded(world, model, data)
