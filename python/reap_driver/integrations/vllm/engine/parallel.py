"""Where an engine runs over several processes or in unusual ways: what of it can be observed."""

from collections.abc import Callable
from typing import Any

Facts = dict[str, Any]
_Reasons = tuple[tuple[Callable[[Any], bool], str], ...]

_NOT_OBSERVED: _Reasons = (
    (
        lambda worker: worker.parallel_config.decode_context_parallel_size > 1,
        "decode context parallelism has not been shown right; start vLLM without "
        "`--decode-context-parallel-size`",
    ),
    (
        lambda worker: bool(getattr(worker.cache_config, "kv_sharing_fast_prefill", False)),
        "some layers compute the last tokens of prompts only; start vLLM without "
        "`--kv-sharing-fast-prefill`",
    ),
    (
        lambda worker: getattr(worker.model_runner, "adaptive_verification", None) is not None,
        "adaptive verification decides on the device which drafted tokens a step computes; start "
        "vLLM without it",
    ),
    (
        lambda worker: _sampled(worker.model_runner) != 1,
        "the model computes the positions of a block of tokens several times (diffusion), so that "
        "no pass is the one to count",
    ),
    (
        lambda worker: bool(getattr(worker.parallel_config, "enable_elastic_ep", False)),
        "experts move between engines that come and go; start vLLM without `--enable-elastic-ep`",
    ),
)
_NOT_MASKED: _Reasons = (
    (
        lambda worker: worker.kv_transfer_config is not None,
        "a KV connector keeps, and shares with other servers, what was computed with other "
        "experts; start vLLM without `--kv-transfer-config`",
    ),
    (
        lambda worker: bool(getattr(worker.parallel_config, "enable_elastic_ep", False)),
        "new engines would start without the mask; start vLLM without `--enable-elastic-ep`",
    ),
)


def _sampled(runner: Any) -> int:
    """Tokens that a pass samples for each request without proposals; V1 runners always one."""
    state = getattr(runner, "model_state", None)
    return int(getattr(state, "num_new_sampled_tokens_per_step", 1))


def observation_refusal(worker: Any) -> str | None:
    """Why an engine cannot be observed, with the remedy, or None."""
    return next((reason for holds, reason in _NOT_OBSERVED if holds(worker)), None)


def mask_refusal(worker: Any) -> str | None:
    """Why experts of an engine cannot be masked, with the remedy, or None."""
    return next((reason for holds, reason in _NOT_MASKED if holds(worker)), None)


def places(worker: Any) -> Facts:
    """Where this worker is among the processes of its engine, and how many there are.

    Returns:
        rank; tp, pp, ep, dp: sizes; tp_rank, pp_rank, ep_rank, dp_rank.
    """
    from vllm.distributed import parallel_state

    config = worker.parallel_config
    tensor, pipeline = parallel_state.get_tp_group(), parallel_state.get_pp_group()
    expert = parallel_state.get_ep_group() if config.enable_expert_parallel else None
    return {
        "rank": int(worker.rank),
        "tp": int(config.tensor_parallel_size),
        "tp_rank": int(tensor.rank_in_group),
        "pp": int(config.pipeline_parallel_size),
        "pp_rank": int(pipeline.rank_in_group),
        "ep": int(expert.world_size) if expert else 1,
        "ep_rank": int(expert.rank_in_group) if expert else 0,
        "dp": int(config.data_parallel_size),
        "dp_rank": int(config.data_parallel_rank),
    }
