"""Prunes the bundled model, converts it to GGUF with llama.cpp's converter, and runs it there.

It needs llama.cpp, from `make test-engines ENVS=llamacpp`; in a clone, this runs it:
`PYTHONPATH=.:python out/interop/llamacpp/bin/python examples/gguf.py`.
"""

import json
import runpy
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

import reap_driver as rd

MODEL = Path(rd.__file__).parent / "demo" / "model"
CONVERTER = Path(sys.prefix) / "llama.cpp"
PROMPT = "def add_1(first, second):\n    return"


def prune(out: Path) -> Path:
    """A checkpoint without a quarter of the experts."""
    texts = [f"def add_{i}(first, second):\n    return first + second + {i}\n" for i in range(100)]
    data = out / "code.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    rd.prune(MODEL, data=data, ratio=0.25, seq_len=128, out=out / "pruned")
    return out / "pruned"


def convert(checkpoint: Path, file: Path, outtype: str = "f32") -> Path:
    """What `python convert_hf_to_gguf.py CHECKPOINT --outfile FILE --outtype f32` does, for a
    tokenizer that is no published one: the converter knows those by a hash, and this one splits
    text as GPT-2's does.
    """
    if str(CONVERTER) not in sys.path:
        sys.path[:0] = [str(CONVERTER), str(CONVERTER / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    given, sys.argv = sys.argv, ["convert", str(checkpoint), "--outfile", str(file)]
    sys.argv += ["--outtype", outtype]
    try:
        runpy.run_path(str(CONVERTER / "convert_hf_to_gguf.py"), run_name="__main__")
    finally:
        sys.argv = given
    return file


def serve(file: Path, threads: int = 1):
    """llama.cpp's server, without a port: in float32 as the file is, so that results compare."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity = 128, 1, -1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    disabled = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.flash_attn_type = disabled
    return xllamacpp.Server(parameters)


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = prune(out)
    server = serve(convert(checkpoint, out / "pruned.gguf"))
    answer = server.handle_completions({"prompt": PROMPT, "max_tokens": 24, "temperature": 0})
    print("llama.cpp:   ", repr(answer["choices"][0]["text"]))

    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), rd.load_model(checkpoint).float()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print("transformers:", repr(text))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "example"))
