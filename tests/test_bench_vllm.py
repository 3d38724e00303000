"""The benchmarks of vLLM, where there is none."""

import pytest

from bench import vllm_cpu, vllm_layer


def test_the_bench_of_vllm_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(vllm_layer, "installed", lambda: False)
    with pytest.raises(SystemExit, match="make test-interop ENVS=vllm"):
        vllm_cpu.main([])
