"""vLLM's engine in this process, with the plugin, and what its calls of workers answer."""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Set before vLLM is imported. The engine runs in this process, so that tests reach its worker.
os.environ.update(
    VLLM_PLUGINS="reap",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_CACHE_ROOT=str(Path(sys.prefix) / "cache"),
)


class Generated(NamedTuple):
    """Ids of a request's prompt and of the tokens after it."""

    prompt: list[int]
    tokens: list[int]

    @property
    def computed(self) -> list[int]:
        """The tokens that went through the model: the last one generated did not."""
        return [*self.prompt, *self.tokens[:-1]]


class Engine:
    """An engine of one or more workers.

    Args:
        model: folder of a checkpoint.
        metadata: see the fixture of this name.
        settings: of `vllm.LLM`.
    """

    def __init__(self, model: Path, metadata: Path, **settings: Any) -> None:
        sys.path.insert(0, str(metadata))
        from vllm import LLM

        settings = {"max_model_len": 256, "max_num_seqs": 8, **settings}
        self.llm = LLM(str(model), dtype="float32", skip_tokenizer_init=True, **settings)

    def call(self, name: str, **arguments: Any) -> Any:
        """What the first worker answers; the others' answers are no refusals either."""
        answers = self.call_all(name, **arguments)
        assert all("error" not in answer or answer["error"] is None for answer in answers), answers
        return answers[0]

    def call_all(self, name: str, **arguments: Any) -> list[Any]:
        """What each worker answers."""
        found: list[Any] = self.llm.collective_rpc(f"reap_{name}", kwargs=arguments)
        return found

    def refusal(self, name: str, **arguments: Any) -> str:
        """The sentence with which all workers refuse."""
        [message] = {answer["error"]["message"] for answer in self.call_all(name, **arguments)}
        assert isinstance(message, str)
        return message

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int | Sequence[int]
    ) -> list[Generated]:
        """Greedy completions of so many tokens each, all requests together."""
        from vllm import SamplingParams

        each = [tokens] * len(prompts) if isinstance(tokens, int) else list(tokens)
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [
                SamplingParams(temperature=0, max_tokens=number, ignore_eos=True, detokenize=False)
                for number in each
            ],
            use_tqdm=False,
        )
        return [
            Generated(list(prompt), list(output.outputs[0].token_ids))
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    @property
    def scheduler(self) -> Any:
        """The engine's scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler


def computed(requests: Iterable[Generated]) -> int:
    """How many tokens went through the model once."""
    return sum(len(request.computed) for request in requests)
