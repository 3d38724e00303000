"""What importing costs: the kernel library needs torch and safetensors, nothing of Hugging Face."""

import subprocess
import sys

BLOCK = """
import sys

BLOCKED = {"transformers", "accelerate", "reap_driver", "triton", "datasets"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Refuse())
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_layer_op_works_without_transformers() -> None:
    code = BLOCK + (
        "import torch, reap_kernels as rk\n"
        "from reap_kernels.testing import CASES, make_experts, make_inputs\n"
        "case = CASES[0]; x = make_inputs(case); stats = rk.LayerStats(case.experts)\n"
        "rk.observe_layer(x.hidden, x.topk_ids, x.topk_weights, make_experts(case), stats)\n"
        "rk.accumulate(torch.ones(3, 4), torch.tensor([0, 1, 1]), torch.ones(3), stats)\n"
        "print(int(stats.count.sum()))"
    )
    assert run(code) == str(64 * 2 + 3)


def test_import_adds_only_what_it_uses() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import reap_kernels\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    assert run(code) == "['reap_kernels', 'safetensors']"
