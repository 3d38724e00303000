"""What engines are known to refuse, rule by rule."""

from typing import Any

import pytest

from reap_driver.planning.serving import Served, Server, obstacles, remarks


def served(kind: str = "qwen3_moe", uniform: bool = True, block: int = 1, group: int = 1, **facts):
    layer = {"num_experts": 96, "top_k": 8, "intermediate_size": 768, **facts}
    return Served(kind, {"a": layer, "b": layer}, uniform, block, group)


GROUPED: dict[str, Any] = {"n_group": 8, "topk_group": 4}
FINE = [
    (served(), Server("vllm")),
    (served(), Server("vllm", tp=4)),
    (served(), Server("vllm", tp=2, ep=8)),
    (served(), Server("vllm", ep=5)),  # some GPUs have one expert more
    (served(), Server("sglang", tp=8, ep=4)),
    (served(block=128), Server("vllm", tp=6)),
    (served(block=128), Server("vllm", tp=8, ep=8)),  # experts are whole
    (served(block=128), Server("sglang", tp=12, ep=4)),
    (served(**GROUPED), Server("sglang", tp=2)),
    (served("deepseek_v4", num_experts=192), Server("vllm", ep=8)),
]


@pytest.mark.parametrize(("model", "server"), FINE)
def test_what_is_served(model: Served, server: Server) -> None:
    assert obstacles(model, server) == []


REFUSED: dict[str, tuple[Served, Server, str]] = {
    "counts": (served(uniform=False), Server("vllm"), "different numbers of experts, and vllm"),
    "shares": (
        served(num_experts=90),
        Server("sglang", tp=4, ep=4),
        "90 experts are not shared out equally among 4 GPUs; keep a multiple of 4, or use `ep` as "
        "one of 1, 2",
    ),
    "strict shares": (
        served("deepseek_v4", num_experts=192),
        Server("vllm", ep=5),
        "192 experts are not shared out equally among 5 GPUs",
    ),
    "kernels": (
        served("deepseek_v4", num_experts=144),
        Server("vllm"),
        "has no kernel for 144 experts; keep 128 or 192",
    ),
    "width": (
        served(),
        Server("vllm", tp=5),
        "768 neurons of each expert do not divide into 5 parts; divide them among 4 at most, or "
        "leave experts whole by `ep`",
    ),
    "blocks": (
        served(block=128),
        Server("vllm", tp=8),
        "into 8 parts of whole blocks of 128; divide them among 6 at most",
    ),
    "blocks of parts": (
        served(block=128),
        Server("sglang", tp=16, ep=2),
        "into 8 parts of whole blocks of 128; divide them among 6 at most",
    ),
    "no block": (
        served(block=128, intermediate_size=200),
        Server("vllm"),
        "200 neurons of each expert do not divide into 1 parts of whole blocks of 128; no number "
        "of GPUs fits",
    ),
    "groups": (
        served(num_experts=90, **GROUPED),
        Server("vllm"),
        "90 experts do not divide into 8 routing groups; plan again",
    ),
    "few in groups": (
        served(num_experts=8, top_k=8, **GROUPED),
        Server("vllm"),
        "a token is routed to 8 experts, and 4 of 8 routing groups hold 4; keep more",
    ),
    "one in a group": (
        served(num_experts=8, top_k=2, **GROUPED),
        Server("vllm"),
        "1 expert is left in a routing group",
    ),
    "few": (served(num_experts=6), Server("vllm"), "is routed to 8 experts, and 1 of 1"),
    "SGLang's group": (served(), Server("sglang", tp=4, ep=3), "`ep=3` does not divide `tp=4`"),
    "vLLM's group": (served(), Server("vllm", tp=4, ep=6), "`ep=6` is no multiple of `tp=4`"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused(why: str) -> None:
    model, server, message = REFUSED[why]
    found = obstacles(model, server)
    assert any(message in text for text in found), found
    assert len(found) == len(set(found))  # once for all layers alike
    assert all(";" in text for text in found), "no remedy"


def test_what_is_served_less_well() -> None:
    [text] = remarks(served(), Server("vllm", ep=5))
    assert text.startswith("96 experts are not shared out equally among 5 GPUs: some have one more")
    assert remarks(served(), Server("vllm", ep=6)) == []
    [text] = remarks(served(group=128), Server("vllm", tp=4))
    assert text.startswith("192 neurons of each expert on a GPU are no multiple of 128, so the fas")
    assert remarks(served(group=128), Server("vllm", tp=6)) == []
    assert remarks(served(group=128), Server("vllm", tp=4, ep=4)) == []


@pytest.mark.parametrize(
    ("server", "parts"),
    [
        (Server("vllm", tp=4), 4),
        (Server("vllm", tp=4, ep=8), 1),
        (Server("sglang", tp=4), 4),
        (Server("sglang", tp=8, ep=2), 4),
        (Server("sglang", tp=8, ep=8), 1),
    ],
)
def test_into_how_many_parts_an_expert_is_divided(server: Server, parts: int) -> None:
    assert server.parts == parts
