"""The MoE layers of one worker's model, observed and masked together."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from vllm.config import CompilationMode

from reap_driver.integrations.vllm.engine import parallel
from reap_driver.integrations.vllm.engine.compiled import make_opaque
from reap_driver.integrations.vllm.engine.layer import HookedLayer
from reap_driver.integrations.vllm.engine.layers import find_layers
from reap_driver.integrations.vllm.engine.runners import Passes
from reap_driver.integrations.vllm.engine.self_check import check_layers
from reap_driver.integrations.vllm.engine.stats_bytes import bytes_of
from reap_driver.integrations.vllm.engine.step import Batch, Step
from reap_driver.integrations.vllm.engine.weights import watch
from reap_kernels import SaliencyStats
from reap_kernels.errors import DataError, PlanError, UnsupportedModel

Answer = dict[str, Any]


class Observer:
    """Statistics and masks of the MoE layers of a worker's model.

    Args:
        worker: a worker of vLLM that has loaded its model and compiled nothing of it.

    Attributes:
        layers: name in the model -> layer.
        step: the running pass, and what was counted.
        error: why statistics or masks are wrong, or None. Reset forgets it.
    """

    def __init__(self, worker: Any) -> None:
        self.worker, runner = worker, worker.model_runner
        self.step = Step(int(worker.scheduler_config.max_num_batched_tokens), worker.device)
        self.error: str | None = None
        self.layers = {
            name: HookedLayer(name, layer, self.step)
            for name, layer in find_layers(runner.get_model()).items()
        }
        self.source = ""  # of the mask, as the server named it
        self._put_back: tuple[dict[str, list[int]], str] | None = None  # a mask, after a change
        self._unproved: dict[str, int] = {}  # layer -> its calls before it was hooked into a pass
        if self.layers:
            compiled = worker.compilation_config.mode != CompilationMode.NONE
            for layer in self.layers.values():
                layer.install()
                if compiled:
                    make_opaque(layer.runner)
            check_layers(self.layers.values(), worker.vllm_config)
            watch(worker, self._before_weights, self._after_weights)
        if self.layers or worker.parallel_config.pipeline_parallel_size > 1:
            # A stage without MoE layers counts tokens, too: a status is that of its first rank.
            step = self.step
            Passes(runner, step.finish, step.enter, self._fill, self._leave, self._due).install()

    # Passes of the engine. What fails here must not end it.

    def _due(self) -> bool:
        return self.step.due

    def _fill(self, batch: Callable[[], Batch]) -> None:
        if not self.step.due:
            return
        try:
            self.step.fill(batch())
        except Exception as error:  # noqa: BLE001  whatever fails here must not end the engine
            self._fail(f"the tokens of a step are unknown: {type(error).__name__}: {error}")

    def _leave(self) -> None:
        observed, real = self.step.observed, self.step.real
        self.step.leave()
        if observed:
            failed = next((layer.error for layer in self.layers.values() if layer.error), None)
            if failed is not None:
                self._fail(failed)
        if self._unproved and real:
            self._prove(observed)

    def _prove(self, observed: bool) -> None:
        """Checks that the pass has called the layers that are observed or masked."""
        due = {
            name: before
            for name, before in self._unproved.items()
            if observed or self.layers[name].masked
        }
        passed = [name for name, before in due.items() if self.layers[name].calls() == before]
        for name in due:
            del self._unproved[name]
        if passed:
            self.mask({}, "")
            self._fail(
                f"layer {passed[0]} was not called in a step: what vLLM compiled or captured goes "
                "past the hook, so that nothing is observed and no mask works; empty vLLM's "
                "compile cache and start it again, or start it with `--enforce-eager`"
            )

    def _fail(self, reason: str) -> None:
        self.step.stop()
        self.error = self.error or reason

    # Changes of the model's weights

    def _before_weights(self, call: str) -> None:
        """Takes the mask out of the weights, and ends an observation: it is of one model."""
        masked = {name: layer.masked for name, layer in self.layers.items() if layer.masked}
        if masked:
            source = self.source
            self.mask({}, "")
            self._put_back = (masked, source)
        if self.step.steps:
            self._fail(f"vLLM exchanged the model's weights (`{call}`) after it had begun")

    def _after_weights(self) -> None:
        if self._put_back is not None:
            self.mask(*self._put_back)

    # Calls

    def facts(self) -> Answer:
        """Where the worker is among those of its engine, and what each layer is."""
        refusal = parallel.observation_refusal(self.worker)
        mask_refusal = parallel.mask_refusal(self.worker)
        layers = {}
        for name, layer in self.layers.items():
            facts = layer.facts()
            facts["refusal"] = facts["refusal"] or refusal
            facts["mask_refusal"] = facts["mask_refusal"] or mask_refusal
            layers[name] = facts
        return {**parallel.places(self.worker), "layers": layers}

    def start(self, mode: str, every: int, groups: Sequence[str], reset: bool) -> None:
        """Observes from the next step on.

        Raises:
            UnsupportedModel: something cannot be observed, or failed its self-check.
            UsageError: see `Step.start`.
            DataError: statistics that went wrong are to be continued.
        """
        refusal = parallel.observation_refusal(self.worker)
        if refusal is not None:
            raise UnsupportedModel(f"this server cannot be observed: {refusal}")
        self._check_layers(self.layers, lambda layer: layer.refusal, "observed")
        if self.error is not None and not reset:
            raise DataError(f"{self.error}; start with `reset`")
        fresh = self.step.start(mode, every, groups, reset)
        if fresh:
            self.error = None
        for name, layer in self.layers.items():
            if fresh:
                layer.reset()
            layer.begin(self.step.num_groups)
            self._unproved[name] = layer.calls()

    def stop(self) -> None:
        """Observes no further step."""
        self.step.stop()

    def reset(self) -> None:
        """Forgets what was observed and an error; goes on observing if it did."""
        self.step.reset()
        self.error = None
        for layer in self.layers.values():
            observed = layer.stats is not None
            layer.reset()
            if observed:
                layer.begin(self.step.num_groups)

    def mask(self, removed: Mapping[str, Sequence[int]], source: str) -> None:
        """Masks exactly these experts; layers that are not named get all of theirs back.

        Args:
            removed: layer -> ids of experts.
            source: what the mask was made of, for the status.

        Raises:
            PlanError: unknown layers or experts, or too few experts left; nothing has changed.
            UnsupportedModel: a layer or this server cannot be masked; nothing has changed.
        """
        wanted = {name: list(ids) for name, ids in removed.items() if ids}
        unknown = sorted(set(wanted) - set(self.layers))
        if unknown and self.worker.parallel_config.pipeline_parallel_size == 1:
            raise PlanError(
                f"layer {unknown[0]} is none of this model's {len(self.layers)} MoE layers "
                f"({', '.join(list(self.layers)[:2])}, ...); give their names"
            )
        here = [name for name in self.layers if name in wanted]
        if here:
            refusal = parallel.mask_refusal(self.worker)
            if refusal is not None:
                raise UnsupportedModel(f"this server cannot be masked: {refusal}")
        for name in here:
            self.layers[name].check_mask(wanted[name])
        self._check_layers(here, lambda layer: layer.mask_refusal, "masked")
        for name, layer in self.layers.items():
            layer.set_mask(wanted.get(name, []))
            if name in here:
                self._unproved[name] = layer.calls()
        self.source, self._put_back = source if wanted else "", None

    def _check_layers(
        self, names: Collection[str], refusal: Callable[[HookedLayer], str | None], verb: str
    ) -> None:
        """Refuses layers that cannot be observed or masked."""
        if not self.layers and self.worker.parallel_config.pipeline_parallel_size == 1:
            raise UnsupportedModel("this model has no MoE layers; serve one that has")
        for name in names:
            reason = refusal(self.layers[name])
            if reason is not None:
                raise UnsupportedModel(f"layer {name} cannot be {verb}: {reason}")

    def status(self) -> Answer:
        """What runs, what was counted and what is masked."""
        masked = {name: layer.masked for name, layer in self.layers.items() if layer.masked}
        found = {"masked": masked, "source": self.source, "error": self.error}
        return {**self.step.status(), **found}

    def statistics(self) -> Answer:
        """This rank's statistics.

        Returns:
            share: "whole", or "part" where ranks count their own experts of each layer; `places`
            of the worker; nonfinite: layer -> expert outputs that were NaN or Inf; file: the bytes
            of a statistics file, with vLLM's names of layers.

        Raises:
            DataError: nothing was observed, or what was observed is wrong.
        """
        if self.error is not None:
            raise DataError(f"these statistics are wrong: {self.error}; start again with `reset`")
        layers = {name: layer.stats for name, layer in self.layers.items()}
        known = {name: stats.to("cpu") for name, stats in layers.items() if stats is not None}
        if len(known) < len(layers):
            raise DataError("nothing was observed; start observing first")
        where = parallel.places(self.worker)
        tokens = list(self.step.tokens().values())
        for name, stats in known.items():
            if stats.tokens.tolist() != tokens:
                raise DataError(
                    f"layer {name} counted {stats.tokens.tolist()} tokens by group, the steps "
                    f"{tokens}: not each step called it once; this model cannot be observed"
                )
        parts = where["ep"] > 1
        file = b""  # of tensor parallel ranks, which count the same, the first sends it
        if parts or where["tp_rank"] == 0:
            file = bytes_of(SaliencyStats(known, list(self.step.group_names)))
        bad = {name: int(stats.nonfinite.sum()) for name, stats in known.items()}
        return {
            "share": "part" if parts else "whole",
            **where,
            "nonfinite": {name: number for name, number in bad.items() if number},
            "file": file,
        }
