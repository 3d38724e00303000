"""The table of storage formats: what the commands did, and what dequantized weights equal.

`python -m tests.driver.formats.table` runs the commands and records what they did.
"""

from bench.rows import ROOT
from bench.table_parts import markdown, newest

# Method that is read here -> environment of `make test-interop` and package whose own dequantized
# weights the tests there compare with ours, bit by bit.
COMPARED = {
    "auto-round": ("autoround", "auto-round"),
    "awq": ("gptqmodel", "gptqmodel"),
    "bitsandbytes": ("autoround", "bitsandbytes"),
    "compressed-tensors": ("llmcompressor", "compressed-tensors"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "modelopt": ("modelopt", "nvidia-modelopt"),
    "torchao": ("autoround", "torchao"),
}
ENVIRONMENTS = ROOT / "tests" / "interop" / "environments"


def pinned(environment: str, package: str) -> str:
    """The version of a package that an environment has."""
    lines = (ENVIRONMENTS / f"{environment}.txt").read_text(encoding="utf-8").splitlines()
    [version] = [line.partition("==")[2] for line in lines if line.startswith(f"{package}==")]
    return version


def formats() -> str:
    """Every format, what can be done with it, and what its weights were compared with."""
    head = ["format", "stored", "observe", "apply", "weights compared with"]
    keys = ("format", "stored", "observe", "apply")
    body = [
        [*(row[key] for key in keys), _compared(row["method"], row["observe"])]
        for row in newest("formats", "format", "stored")
    ]
    return markdown(head, body)


def _compared(method: str, observe: str) -> str:
    """The package and version, for a method that is observed."""
    from reap_driver.compat.pretrained import DEQUANTIZED_ON_LOAD
    from reap_driver.load.methods import METHODS

    if observe != "yes" or not method:
        return ""
    if method in DEQUANTIZED_ON_LOAD:
        return "made by transformers"
    assert METHODS[method].reader is not None, method
    environment, package = COMPARED[method]
    return f"{package} {pinned(environment, package)}"
