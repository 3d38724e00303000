"""What importing costs: the kernel library needs torch and safetensors, nothing of Hugging Face."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.limits import HUNG

# A process in which packages that ours may not need cannot be imported, and whoever tries is noted.
SCRIPT = """
import json, sys
import torch

BLOCKED = {"transformers", "accelerate", "reap_driver", "triton", "datasets"}
wanted = []

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            wanted.append(name)
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Refuse())
before = set(sys.modules)
import reap_kernels as rk
new = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
found = {"new": sorted(new), "wanted": list(wanted)}

from reap_kernels.testing import CASES, make_experts, make_inputs
case = CASES[0]; x = make_inputs(case); stats = rk.LayerStats(case.experts)
rk.observe_layer(x.hidden, x.topk_ids, x.topk_weights, make_experts(case), stats)
rk.accumulate(torch.ones(3, 4), torch.tensor([0, 1, 1]), torch.ones(3), stats)
print(json.dumps({**found, "slots": int(stats.count.sum())}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the process says."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=HUNG
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_layer_op_works_without_transformers(found: dict[str, Any]) -> None:
    assert found["slots"] == 64 * 2 + 3


def test_import_adds_only_what_it_uses(found: dict[str, Any]) -> None:
    """And tries nothing else."""
    assert found["new"] == ["reap_kernels", "safetensors"]
    assert found["wanted"] == []
