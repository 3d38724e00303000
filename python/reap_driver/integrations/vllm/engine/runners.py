"""vLLM's two model runners: where a pass of requests begins, has its tokens in order, and ends.

`v1/worker/gpu_model_runner.py` ("V1") orders requests in its `input_batch` and `_prepare_inputs`
is given their tokens; `v1/worker/gpu/model_runner.py` ("V2") returns the batch it made from
`prepare_inputs`. Profiling, capture and dummy runs call neither.

On the CPU V1 has run; V2 needs Triton, and both runners' graphs need a GPU: these were read, and
are played by objects in tests.
"""

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from reap_driver.integrations.vllm.engine.step import Batch
from reap_kernels.errors import UnsupportedModel


class Passes:
    """Calls back around each pass of requests of a model runner.

    Args:
        runner: vLLM's model runner, of either kind, once its model is loaded.
        finished: called with the ids of requests that are over, also by steps without tokens.
        enter: called before a pass of requests.
        fill: called with its `Batch` when its tokens are in order.
        leave: called when it is over, also where it failed.
        eager: whether the pass that `enter` began may replay no graph.
    """

    def __init__(
        self,
        runner: Any,
        finished: Callable[[Collection[str]], None],
        enter: Callable[[], None],
        fill: Callable[[Callable[[], Batch]], None],
        leave: Callable[[], None],
        eager: Callable[[], bool],
    ) -> None:
        self.runner, self.finished = runner, finished
        self.enter, self.fill, self.leave, self.eager = enter, fill, leave, eager

    def install(self) -> None:
        """Wraps the methods of this runner.

        Raises:
            UnsupportedModel: a runner of another kind.
        """
        runner = self.runner
        read: Callable[[Any, Any, Any], Batch]
        if hasattr(runner, "prepare_inputs"):
            prepare, read = "prepare_inputs", batch_of_v2
        elif hasattr(runner, "_prepare_inputs"):
            prepare, read = "_prepare_inputs", batch_of_v1
        else:
            raise UnsupportedModel(
                f"{type(runner).__name__} has neither `prepare_inputs` nor `_prepare_inputs`: "
                "reap-kernels knows the model runners of vLLM 0.32 for CPU and GPU only"
            )
        original = getattr(runner, prepare)

        @functools.wraps(original)
        def prepared(*args: Any, **kwargs: Any) -> Any:
            result, output = original(*args, **kwargs), _output(*args, **kwargs)
            self.fill(lambda: read(runner, output, result))
            return result

        setattr(runner, prepare, prepared)
        runner.execute_model = self._around(runner.execute_model)

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def execute_model(*args: Any, **kwargs: Any) -> Any:
            output = _output(*args, **kwargs)
            if kwargs.get("dummy_run"):
                return original(*args, **kwargs)
            self.finished(output.finished_req_ids)
            if not output.total_num_scheduled_tokens:
                return original(*args, **kwargs)
            self.enter()
            try:
                if self.eager():
                    with without_graphs(self.runner):
                        return original(*args, **kwargs)
                return original(*args, **kwargs)
            finally:
                self.leave()

        return execute_model


def _output(scheduler_output: Any, *_: Any, **__: Any) -> Any:
    """The first argument of both methods, given by place or by name."""
    return scheduler_output


def batch_of_v1(runner: Any, output: Any, _: Any) -> Batch:
    """The tokens of a pass, after `_prepare_inputs` of the V1 runner."""
    count = runner.input_batch.num_reqs
    requests = list(runner.input_batch.req_ids[:count])
    return _batch(requests, output, runner.positions)


def batch_of_v2(_: Any, output: Any, batch: Any) -> Batch:
    """The tokens of a pass, from what `prepare_inputs` of the V2 runner returned."""
    return _batch(list(batch.req_ids), output, batch.positions)


def _batch(requests: list[str], output: Any, positions: Any) -> Batch:
    drafted = output.scheduled_spec_decode_tokens
    return Batch(
        requests,
        [int(output.num_scheduled_tokens[request]) for request in requests],
        [len(drafted.get(request, ())) for request in requests],
        positions,
    )


@contextmanager
def without_graphs(runner: Any) -> Iterator[None]:
    """No captured graph is chosen inside, so that Python of the layers runs.

    Both runners ask `dispatch` of one object which graph a pass replays; that no graph fits is an
    answer they have. Under data parallelism every engine then runs without.
    """
    chosen = []
    for name, answer in (("cudagraph_dispatcher", _none_v1), ("cudagraph_manager", _none_v2)):
        owner = getattr(runner, name, None)
        if owner is not None:
            owner.dispatch = functools.partial(answer, owner.dispatch)
            chosen.append(owner)
    try:
        yield
    finally:
        for owner in chosen:
            del owner.dispatch


def _none_v1(dispatch: Callable[..., Any], num_tokens: int, *args: Any, **kwargs: Any) -> Any:
    """`CudagraphDispatcher.dispatch` of the V1 runner, where no graph fits."""
    mode, found = dispatch(num_tokens, *args, **kwargs)
    return type(mode).NONE, type(found)(num_tokens)


def _none_v2(
    dispatch: Callable[..., Any], num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any
) -> Any:
    """`CudaGraphManager.dispatch` of the V2 runner, where no graph fits."""
    found = dispatch(num_reqs, num_tokens, *args, **kwargs)
    return replace(
        found,
        cg_mode=type(found.cg_mode).NONE,
        num_tokens=num_tokens,
        num_reqs=num_reqs,
        uniform_token_count=None,
        max_query_len=None,
    )
