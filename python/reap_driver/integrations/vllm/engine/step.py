"""Which tokens of a forward pass are counted, and for which group.

A token is counted at most once, when its position of its request is computed in an observed step:
padding and dummy runs have no request; drafted tokens of speculative decoding may be rejected,
so none of them is counted; positions that a request has computed before (it lost its cache and
starts again) are known by a mark per request, the first position not counted yet. Marks and
positions stay on the device: under asynchronous scheduling the host does not know positions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reap_driver.integrations.vllm.engine.groups import ALL, group_of, named
from reap_kernels.errors import DataError, UsageError

MODES = ("replace", "shadow")
DRAFTED = -1  # in place of a request's slot, for tokens that speculative decoding drafted


@dataclass(frozen=True)
class Batch:
    """The tokens of one forward pass, request after request, as the model sees them.

    Attributes:
        requests: ids of the requests, in the order of their tokens.
        tokens: how many tokens each request has in this pass.
        drafted: how many of these, its last ones, are proposals of speculative decoding.
        positions: [tokens] integers on the device, the position of each token in its request.
    """

    requests: Sequence[str]
    tokens: Sequence[int]
    drafted: Sequence[int]
    positions: Tensor


class Step:
    """What layers ask about the running forward pass, and what has been counted so far.

    Attributes:
        mode: "off", "replace" or "shadow".
        every: each `every`-th step is observed.
        due: whether the running pass is to be observed, so that no graph may be replayed.
        real: whether the running pass is one of requests; profiling and dummy runs are not.
        observed: whether layers observe the running pass: it is due, and its tokens are known.
        counted_in: modes in which passes were counted since the start or the reset.
        group_names, num_groups: names of the groups, "all" first, and how many.
        steps, observed_steps: passes of requests since the start or the reset.
        drafted: tokens of observed steps that were not counted as proposals.

    Example:
        >>> step = Step(max_tokens=8, device=torch.device("cpu"))
        >>> step.start("replace")
        >>> step.enter()
        >>> step.fill(Batch(["code:1"], [3], [0], torch.arange(3)))
        >>> step.counted(4)
        tensor([ True,  True,  True, False])
        >>> step.leave()
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.mode, self.every = "off", 1
        self.due = self.real = self.observed = False
        self.group_names = [ALL]
        self.device = device
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        with torch.inference_mode(False):
            self._counted = torch.zeros(max_tokens, dtype=torch.bool, device=device)
            self._groups = torch.zeros(max_tokens, dtype=torch.int64, device=device)
            self._slot = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._clear()

    def counted(self, number: int) -> Tensor:
        """[number] bool: whether each of the first `number` rows of the pass counts."""
        return self._counted[: self._within(number)]

    def groups(self, number: int) -> Tensor:
        """[number] int64: the group of each of the first `number` rows of the pass."""
        return self._groups[: self._within(number)]

    def _within(self, number: int) -> int:
        if number > len(self._counted):
            raise DataError(
                f"a layer was given {number} rows, but the engine schedules at most "
                f"{len(self._counted)} tokens a step: rows of other engines or microbatches; "
                "serve without data parallelism and dual batch overlap"
            )
        return number

    def start(
        self, mode: str, every: int = 1, groups: Sequence[str] = (), reset: bool = True
    ) -> bool:
        """Observes from the next step on; whether it counts from nothing.

        Raises:
            UsageError: an unknown mode, `every` below 1, or other groups than those of statistics
                that are to be continued.
        """
        if mode not in MODES:
            raise UsageError(f"`mode` is {mode!r}; give one of {', '.join(MODES)}")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise UsageError(f"`every` is {every!r}; give 1 or more: each N-th step is observed")
        names = named(groups)
        if not reset and self.steps and names != self.group_names:
            raise UsageError(
                f"`groups` is {names}, but the statistics to continue have {self.group_names}; "
                "give these, or reset"
            )
        fresh = reset or names != self.group_names
        if fresh:
            self.group_names, self.mode = names, mode
            self._clear()
        self.mode, self.every = mode, every
        if mode not in self.counted_in:
            self.counted_in.append(mode)
        return fresh

    def stop(self) -> None:
        """Observes no further step; what was counted stays."""
        self.mode = "off"

    def reset(self) -> None:
        """Forgets what was counted, which tokens were, and goes on in the same mode."""
        self._clear()

    def _clear(self) -> None:
        self.num_groups = len(self.group_names)
        self.steps = self.observed_steps = self.drafted = 0
        self.counted_in = [] if self.mode == "off" else [self.mode]
        self._slots.clear()
        self._free.clear()
        with torch.inference_mode(False):
            self._marks = torch.zeros(64, dtype=torch.int64, device=self.device)
            self._tokens = torch.zeros(self.num_groups, dtype=torch.int64, device=self.device)
            self._again = torch.zeros((), dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            self._groups.zero_()

    def tokens(self) -> dict[str, int]:
        """Tokens counted, by group. Waits for the device."""
        return dict(zip(self.group_names, self._tokens.tolist(), strict=True))

    def not_counted(self) -> dict[str, int]:
        """Tokens of observed steps that were not counted, by reason. Waits for the device."""
        return {"drafted": self.drafted, "recomputed": int(self._again)}

    def finish(self, requests: Iterable[str]) -> None:
        """Forgets the marks of requests that have no further tokens."""
        for request in requests:
            slot = self._slots.pop(request, None)
            if slot is not None:
                self._free.append(slot)

    def enter(self) -> None:
        """A pass of requests begins."""
        self.real = True
        if self.mode != "off":
            self.due = self.steps % self.every == 0
            self.steps += 1

    def leave(self) -> None:
        """The pass is over."""
        self.due = self.real = self.observed = False

    @torch.inference_mode()
    def fill(self, batch: Batch) -> None:
        """Says which rows of the observed pass count: now that its tokens are in order."""
        if not self.due:
            return
        number = sum(batch.tokens)
        slots, groups = [], []
        for request, slot, tokens, drafted in zip(
            batch.requests,
            self._slots_of(batch.requests),
            batch.tokens,
            batch.drafted,
            strict=True,
        ):
            slots += [slot] * (tokens - drafted) + [DRAFTED] * drafted
            groups += [group_of(request, self.group_names)] * tokens
        self._slot[:number].copy_(self._sent(slots), non_blocking=True)
        self._groups[:number].copy_(self._sent(groups), non_blocking=True)
        self._count(number, batch.positions[:number])
        self.drafted += sum(batch.drafted)
        self.observed_steps += 1
        self.observed = True

    def _count(self, number: int, positions: Tensor) -> None:
        """Marks the rows that count, in place and without waiting for the device."""
        slot, groups = self._slot[:number], self._groups[:number]
        sure, mark = slot != DRAFTED, slot.clamp(min=0)
        counted = sure & (positions >= self._marks[mark])
        self._counted.zero_()
        self._counted[:number] = counted
        after = torch.where(counted, positions + 1, 0).to(torch.int64)
        self._marks.scatter_reduce_(0, mark, after, "amax")
        self._tokens.scatter_add_(0, groups, counted.to(torch.int64))
        self._again += (sure & ~counted).sum()

    def _slots_of(self, requests: Sequence[str]) -> list[int]:
        """Where each request's mark is; new requests get one that says 0."""
        fresh = [request for request in requests if request not in self._slots]
        for request in fresh:
            self._slots[request] = self._free.pop() if self._free else len(self._slots)
        if fresh:
            places = [self._slots[request] for request in fresh]
            missing = max(places) + 1 - len(self._marks)
            if missing > 0:
                with torch.inference_mode(False):
                    room = self._marks.new_zeros(max(missing, len(self._marks)))
                    self._marks = torch.cat([self._marks, room])
            self._marks[self._sent(places).to(self.device, non_blocking=True)] = 0
        return [self._slots[request] for request in requests]

    def _sent(self, values: list[int]) -> Tensor:
        """A copy of `values` on the host that the device reads without the host waiting."""
        return torch.tensor(values, dtype=torch.int64, pin_memory=self.device.type == "cuda")

    def status(self) -> dict[str, Any]:
        """What the calls of `engine.worker` answer of it. Waits for the device."""
        return {
            "mode": self.mode,
            "every": self.every,
            "counted_in": list(self.counted_in),
            "tokens": self.tokens(),
            "not_counted": self.not_counted(),
            "steps": self.steps,
            "observed_steps": self.observed_steps,
        }
