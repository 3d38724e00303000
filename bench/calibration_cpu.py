"""Reading, tokenizing and packing records, compared with the tokenizer alone, on the CPU.

Three variants alternate over several rounds in one process with the same threads: ours, from JSON
lines to packed sequences; the tokenizer called on lists of 1,000 texts in memory; and the same
returning token ids only, as ours requests. A figure is the median over rounds of the ratio to ours
in the same round, for elapsed seconds and for processor seconds, which other work on the machine
affects less. Texts are words of this project's sources. Messages are rendered in advance for the
tokenizer alone, and within the measured time for ours.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bench import rows
from reap_driver.compat.model_config import load_config
from reap_driver.data.encode import Encoder
from reap_driver.data.packing import PackedSource, pack
from reap_driver.data.source import DataSource

MODEL = rows.ROOT / "python/reap_driver/demo/model"
SHAPES = ("text", "messages")
_BATCH = 1000

Times = tuple[float, float]  # elapsed seconds, processor seconds


def _words() -> list[str]:
    files = sorted((rows.ROOT / "python").rglob("*.py"))
    return [word for file in files for word in file.read_text(encoding="utf-8").split()]


def _records(shape: str, count: int) -> list[dict[str, Any]]:
    """Records of 10 to 190 words, as one text or as conversations of four turns."""
    rng, words = random.Random(0), _words()
    made = []
    for _ in range(count):
        said = rng.choices(words, k=rng.randint(10, 190))
        if shape == "text":
            made.append({"text": " ".join(said)})
        else:
            parts = [" ".join(said[turn::4]) for turn in range(4)]
            roles = ("user", "assistant") * 2
            turns = zip(roles, parts, strict=True)
            made.append({"messages": [{"role": role, "content": part} for role, part in turns]})
    return made


def _texts(tokenizer: Any, records: list[dict[str, Any]]) -> list[str]:
    if "text" in records[0]:
        return [record["text"] for record in records]
    return [tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in records]


def _timed(work: Callable[[], Any]) -> tuple[Any, Times]:
    start, processors = time.perf_counter(), time.process_time()
    result = work()
    return result, (time.perf_counter() - start, time.process_time() - processors)


def _alone(tokenizer: Any, texts: list[str], **options: bool) -> None:
    for start in range(0, len(texts), _BATCH):
        _ = tokenizer(texts[start : start + _BATCH], **options)["input_ids"]


def _verify(tokenizer: Any, texts: list[str], packed: PackedSource, special: bool) -> None:
    """Fails unless the packed ids are the tokenizer's, with separators between documents."""
    ids = array("i")
    for document in tokenizer(texts, add_special_tokens=special)["input_ids"]:
        if ids and ids[-1] != packed.separator:
            ids.append(packed.separator)
        ids.extend(document)
    if ids.tolist() != packed.ids[: len(ids)].tolist():
        raise SystemExit("the packed ids are not those of the tokenizer")


def measure(shape: str, count: int, rounds: int) -> dict[str, object]:
    """One row: seconds of each variant, and our speed relative to the tokenizer alone."""
    tokenizer, config = AutoTokenizer.from_pretrained(MODEL), load_config(MODEL)
    records = _records(shape, count)
    texts = _texts(tokenizer, records)
    special = {"add_special_tokens": shape == "text"}
    slim = {**special, "return_attention_mask": False, "return_token_type_ids": False}
    taken: dict[str, list[Times]] = {"ours": [], "alone": [], "ids": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        del records
        source = DataSource(path, "bench")
        for turn in range(rounds):
            work = lambda: pack(source, Encoder(MODEL, config), seq_len=2048)  # noqa: E731
            packed, times = _timed(work)
            taken["ours"].append(times)
            if turn == 0:
                _verify(tokenizer, texts[:_BATCH], packed, shape == "text")
            taken["alone"].append(_timed(lambda: _alone(tokenizer, texts, **special))[1])
            taken["ids"].append(_timed(lambda: _alone(tokenizer, texts, **slim))[1])
    seconds = {name: statistics.median(t[0] for t in times) for name, times in taken.items()}
    row: dict[str, object] = {
        "shape": shape,
        "records": count,
        "tokens": len(packed.ids),
        "rounds": rounds,
        **{f"{name}_s": f"{value:.2f}" for name, value in seconds.items()},
        "ours_tokens_per_s": f"{len(packed.ids) / seconds['ours']:.0f}",
    }
    for kind, part in (("passed", 0), ("processor", 1)):
        for name in ("alone", "ids"):
            pairs = zip(taken[name], taken["ours"], strict=True)
            ratio = statistics.median(theirs[part] / ours[part] for theirs, ours in pairs)
            row[f"{name}/ours_{kind}"] = f"{ratio:.3f}"
    return row


def main(arguments: list[str]) -> None:
    """Runs texts and messages; prints the rows, and appends them with --record."""
    parser = argparse.ArgumentParser(prog="python -m bench calibration_cpu", description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--record", action="store_true", help="append the rows to bench/results")
    options = parser.parse_args(arguments)
    for shape in options.shape or SHAPES:
        row = measure(shape, options.records, options.rounds)
        if options.record:
            rows.write("calibration_cpu", [row])
        else:
            print(row, flush=True)
