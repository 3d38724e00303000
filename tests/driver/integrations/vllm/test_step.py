"""Which tokens of vLLM's passes count: batches as its schedulers make them, without vLLM."""

from collections.abc import Sequence

import pytest
import torch

from reap_driver.integrations.vllm.engine.groups import group_of, named
from reap_driver.integrations.vllm.engine.step import Batch, Step
from reap_kernels.errors import DataError, UsageError

CPU = torch.device("cpu")


def started(groups: Sequence[str] = (), every: int = 1, mode: str = "replace") -> Step:
    step = Step(max_tokens=32, device=CPU)
    step.start(mode, every, groups)
    return step


def run(
    step: Step, *requests: tuple[str, int, int] | tuple[str, int, int, int], finished: object = ()
) -> list[int]:
    """A pass of requests (id, first position, tokens, drafted); the places of rows that count."""
    rows = [(*request, 0)[:4] for request in requests]
    positions = [
        position for _, first, number, _ in rows for position in range(first, first + number)
    ]
    step.finish(finished)
    step.enter()
    step.fill(
        Batch(
            [row[0] for row in rows],
            [row[2] for row in rows],
            [row[3] for row in rows],
            torch.tensor([*positions, 0, 0, 0]),
        )
    )
    counted = step.counted(32).nonzero().flatten().tolist() if step.observed else []
    step.leave()
    return counted


def test_counts_tokens_of_requests_and_no_padding() -> None:
    step = started()
    assert run(step, ("a", 0, 3), ("b", 0, 2)) == [0, 1, 2, 3, 4]
    assert run(step, ("b", 2, 1)) == [0]
    assert step.status() == {
        "mode": "replace",
        "every": 1,
        "counted_in": ["replace"],
        "tokens": {"all": 6},
        "not_counted": {"drafted": 0, "recomputed": 0},
        "steps": 2,
        "observed_steps": 2,
    }


def test_chunks_of_a_prompt_count_once_each() -> None:
    step = started()
    assert len(run(step, ("a", 0, 8))) == 8
    assert len(run(step, ("a", 8, 8), ("b", 0, 4))) == 12
    assert len(run(step, ("a", 16, 3), ("b", 4, 1))) == 4
    assert step.tokens() == {"all": 24}


def test_cached_prefix_is_not_counted() -> None:
    step = started()
    assert run(step, ("a", 16, 4)) == [0, 1, 2, 3]
    assert step.tokens() == {"all": 4}


def test_tokens_computed_again_after_preemption_count_once() -> None:
    step = started()
    run(step, ("a", 0, 6))
    for position in (6, 7, 8):
        run(step, ("a", position, 1))
    assert run(step, ("a", 0, 10)) == [9]  # it lost its cache and starts again, with a new token
    assert step.tokens() == {"all": 10}
    assert step.not_counted() == {"drafted": 0, "recomputed": 9}


def test_proposals_do_not_count_and_rejected_positions_do_once() -> None:
    step = started()
    run(step, ("a", 0, 4))
    assert run(step, ("a", 4, 4, 3), ("b", 0, 2)) == [0, 4, 5]
    # Two of three proposals were accepted: positions 5 and 6 are not computed again, 7 is.
    assert run(step, ("a", 7, 4, 3), ("b", 2, 1)) == [0, 4]
    # None was accepted: 8 was a proposal before.
    assert run(step, ("a", 8, 1)) == [0]
    assert step.tokens() == {"all": 10}
    assert step.not_counted() == {"drafted": 6, "recomputed": 0}


def test_positions_come_from_the_device_where_the_host_is_ahead() -> None:
    """Asynchronous scheduling plans as if all proposals were accepted; a mark made of such a
    position would leave later tokens out.
    """
    step = started()
    run(step, ("a", 0, 4))
    run(step, ("a", 4, 4, 3))
    assert run(step, ("a", 5, 4, 3)) == [0]  # the scheduler said 8; the device knows 5
    assert step.tokens() == {"all": 6}


def test_every_nth_step_is_observed() -> None:
    step = started(every=3, mode="shadow")
    counted = [len(run(step, ("a", position, 1))) for position in range(7)]
    assert counted == [1, 0, 0, 1, 0, 0, 1]
    assert (step.steps, step.observed_steps) == (7, 3)


def test_passes_that_are_not_observed_count_nothing() -> None:
    step = Step(max_tokens=8, device=CPU)
    run(step, ("a", 0, 3))
    assert step.tokens() == {"all": 0}
    step.start("replace")
    assert not step.observed  # a dummy run between two passes of requests
    step.enter()
    assert step.due
    assert not step.observed  # tokens are not known yet
    step.leave()
    step.stop()
    assert run(step, ("a", 3, 1)) == []


def test_groups_of_requests() -> None:
    step = started(["code", "chat"])
    run(step, ("cmpl-code:1-0-ab", 0, 3), ("chatcmpl-chat:2-ab", 0, 2), ("cmpl-9-0-ab", 0, 4))
    assert step.groups(9).tolist() == [1, 1, 1, 2, 2, 0, 0, 0, 0]
    assert step.tokens() == {"all": 4, "code": 3, "chat": 2}


@pytest.mark.parametrize(
    ("request_id", "group"),
    [
        ("code:1", "code"),
        ("code:a:b", "code"),
        ("cmpl-code:1-0-1a2b3c4d", "code"),
        ("chatcmpl-code:1-1a2b3c4d", "code"),
        ("3_cmpl-code:1-0-1a2b3c4d", "code"),
        ("generate-tokens-code:1", "code"),
        ("transcribe-code:1", "code"),
        ("cmpl-my-code:1-0", "my-code"),
        ("my-code:1", "my-code"),
        ("cmpl-cmpl-1:2", "cmpl-1"),
        ("1_2:x", "1_2"),
        ("cmpl-other:1", "all"),
        ("cmpl-all:1", "all"),
        ("cmpl-code", "all"),
        ("codex:1", "all"),
        ("", "all"),
        (":", "all"),
    ],
)
def test_group_of_a_request_id(request_id: str, group: str) -> None:
    groups = named(["code", "my-code", "cmpl-1", "1_2"])
    assert groups[group_of(request_id, groups)] == group


def test_finished_requests_are_forgotten() -> None:
    step = started()
    for number in range(200):  # more than marks at the start
        run(step, (f"r{number}", 0, 2), ("long", number, 1), finished={f"r{number - 1}"})
    assert len(step._slots) == 2
    assert len(step._marks) == 64
    assert run(step, ("long", 0, 1), finished={"long"}) == [0]  # the same id, another request


def test_many_requests_at_once() -> None:
    step = Step(max_tokens=300, device=CPU)
    step.start("replace")
    run(step, *((f"r{number}", 0, 1) for number in range(200)))
    run(step, *((f"r{number}", 1, 1) for number in range(200)))
    run(step, *((f"r{number}", 0, 1) for number in range(200)))
    assert step.tokens() == {"all": 400}
    assert step.not_counted()["recomputed"] == 200


def test_reset_counts_positions_anew() -> None:
    step = started(["code"])
    run(step, ("code:1", 0, 3))
    step.reset()
    assert step.tokens() == {"all": 0, "code": 0}
    assert run(step, ("code:1", 0, 4)) == [0, 1, 2, 3]


def test_goes_on_after_a_stop_without_counting_twice() -> None:
    step = started()
    run(step, ("a", 0, 3))
    step.stop()
    run(step, ("a", 3, 1))
    assert step.start("shadow", reset=False) is False
    assert run(step, ("a", 0, 5)) == [3, 4]
    assert step.tokens() == {"all": 5}


def test_buffers_stay_where_they_are() -> None:
    step = started()
    places = [step.counted(1).data_ptr(), step.groups(1).data_ptr()]
    run(step, ("a", 0, 3))
    step.reset()
    step.start("shadow", groups=["x"])
    run(step, ("x:a", 0, 3))
    assert [step.counted(1).data_ptr(), step.groups(1).data_ptr()] == places


def test_runs_inside_and_outside_of_inference_mode() -> None:
    with torch.inference_mode():
        step = started()
        run(step, *((f"r{number}", 0, 1) for number in range(30)))
    step.reset()
    run(step, ("a", 0, 3))
    with torch.inference_mode():
        step.start("replace", groups=["x"])
    run(step, ("x:a", 0, 3))
    assert step.tokens() == {"all": 0, "x": 3}


def test_modes_are_known_after_the_end() -> None:
    step = started(mode="shadow")
    assert step.counted_in == ["shadow"]
    step.stop()
    assert step.counted_in == ["shadow"]
    step.start("replace", reset=False)
    assert step.counted_in == ["shadow", "replace"]
    step.reset()
    assert step.counted_in == ["replace"]
    step.stop()
    step.reset()
    assert step.counted_in == []


def test_refuses_what_it_cannot_start() -> None:
    step = Step(max_tokens=32, device=CPU)
    with pytest.raises(UsageError, match="`mode` is 'both'; give one of replace, shadow"):
        step.start("both")
    for every in (0, -1, True, 1.5):
        with pytest.raises(UsageError, match="`every` is"):
            step.start("shadow", every=every)  # type: ignore[arg-type]
    step.start("replace", groups=["code"])
    run(step, ("a", 0, 1))
    with pytest.raises(UsageError, match=r"the statistics to continue have \['all', 'code'\]"):
        step.start("replace", groups=["chat"], reset=False)
    assert step.tokens() == {"all": 1, "code": 0}


def test_refuses_more_rows_than_a_step_schedules() -> None:
    with pytest.raises(DataError, match="a layer was given 9 rows, but the engine schedules at"):
        Step(max_tokens=8, device=CPU).counted(9)
