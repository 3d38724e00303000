"""Quantizes a pruned checkpoint with AutoRound, on the text that its experts were observed on.

    python with_auto_round.py PRUNED OUT --scheme W3A16 --data code.jsonl:500

W4A16 and W3A16 are weights of 4 and 3 bits that share a scale in groups of 128. AutoRound adds a
name to OUT, which is printed. PRUNED stays as it is.
"""

import argparse
import json
import shutil
from pathlib import Path

from auto_round import AutoRound

import reap_driver as rd


def quantize(
    pruned, out, *, scheme="W4A16", data=(), seq_len=2048, group_size=128, iters=200, bits=None
):
    """Writes the quantized checkpoint, with the record of the pruning; see the options below."""
    rows = [batch["input_ids"] for _, batch in rd.calibration(pruned, data, seq_len=seq_len)]
    quantizer = AutoRound(
        str(pruned),
        scheme=scheme,
        group_size=group_size,
        layer_config=json.loads(Path(bits).read_text()) if bits else None,
        dataset=rows,
        nsamples=len(rows),
        seqlen=seq_len,
        iters=iters,
        enable_torch_compile=False,
    )
    _, folder = quantizer.quantize_and_save(str(out), format="auto_round")
    record = Path(pruned, "reap")
    if record.is_dir():
        shutil.copytree(record, Path(folder, "reap"), dirs_exist_ok=True)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="quantizes a pruned checkpoint")
    parser.add_argument("pruned", metavar="PRUNED", help="its folder")
    parser.add_argument("out", metavar="OUT", help="folder in which the quantized one goes")
    parser.add_argument("--scheme", default="W4A16", help="AutoRound's name of bits and types")
    parser.add_argument("--data", nargs="+", required=True, help="text, as `prune` takes it")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--group-size", type=int, default=128, help="weights with one scale")
    parser.add_argument("--iters", type=int, default=200, help="steps of tuning in each layer")
    parser.add_argument("--bits", metavar="FILE", help="layer_config.json of `report --bits`")
    print(quantize(**vars(parser.parse_args())))
