"""What the routes do with an engine: observation, masks, plans and files, and how each can fail."""

import asyncio
import errno
import json
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

import reap_driver as rd
import reap_kernels as rk
from reap_driver.integrations.vllm.server import bodies, engine
from reap_driver.integrations.vllm.server.refusals import Refused
from reap_driver.integrations.vllm.server.saving import StatsFolder
from reap_driver.integrations.vllm.server.session import Session
from reap_driver.integrations.vllm.server.status import Vllm
from reap_kernels import files
from reap_kernels.errors import UnsupportedModel, UsageError
from tests.driver.integrations.vllm.fake_engine import OURS, THEIRS, FakeClient, Rank, facts, qwen

PROFILE = b'{"pruned_experts": [[1, 1], [3, 7], [3, 0]]}'
MASKED = {THEIRS[0]: [1], THEIRS[2]: [0, 7]}
EXCHANGED = ["pause", "reap_mask", "reset_prefix_cache", "resume"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def client(folder: Path) -> FakeClient:
    return FakeClient(folder)


def session(client: FakeClient, saves: Path | str | None = None) -> Session:
    return Session(
        client, Vllm("0.32.0", "untested"), StatsFolder(None if saves is None else str(saves))
    )


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def start(**asked: Any) -> dict[str, Any]:
    return bodies.START.read(json.dumps(asked).encode(), bodies.JSON)


def refused(work: Coroutine[Any, Any, Any], status: int, message: str) -> None:
    with pytest.raises(Refused, match=message) as found:
        run(work)
    assert found.value.status == status


def test_an_observation(client: FakeClient) -> None:
    async def work() -> None:
        one = session(client)
        found = await one.start(start(mode="shadow", every=4, groups=["code"]))
        assert (found["mode"], found["every"]) == ("shadow", 4)
        assert found["groups"] == {"all": 0, "code": 0}
        client.ranks[0].tokens = {"all": 5, "code": 40}
        found = await one.status()
        assert (found["tokens"], found["mask"], found["vllm"]) == (45, None, "0.32.0")
        assert found["layers"][OURS[0]] == {"num_experts": 8, "top_k": 2, "masked": 0}
        assert found["version"] == rk.__version__
        assert (await one.stop())["mode"] == "off"
        assert (await one.reset())["tokens"] == 0

    run(work())
    assert client.calls.count("reap_facts") == 1


def test_a_plan_from_live_statistics(client: FakeClient, tmp_path: Path) -> None:
    client.ranks[0].tokens = {"all": 0, "code": 300, "chat": 200}
    asked = {"ratio": 0.25, "criterion": "ean_mean", "weights": {"code": 3, "chat": 1}}
    text = run(session(client).plan(asked))
    (tmp_path / "plan.json").write_text(text)
    plan = rd.Plan.load(tmp_path / "plan.json")
    assert (plan.criterion, plan.ratio) == ("ean_mean", 0.25)
    stats = tmp_path / "stats"
    stats.write_bytes(run(session(client).stats()))
    assert plan.kept == rd.plan(stats, **asked).plan.kept
    run(session(client).set_mask(text.encode()))
    assert {len(ids) for ids in client.ranks[0].masked.values()} == {2}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ratio": 0.5, "keep": 3}, "`keep`: not together with `ratio`"),
        ({"keep": 99}, "99"),
        ({"criterion": "best"}, "`criterion`"),
        ({"normalize": "max"}, "only with `allocation='global'`"),
        ({"weights": {"other": 1}}, "other"),
        ({"protect": {"99": [1]}}, "layer '99' is none of the 3"),
        ({"skip_first": 2, "skip_last": 1}, "leave none of the 3"),
    ],
)
def test_plans_that_are_not_possible(client: FakeClient, asked: Any, message: str) -> None:
    client.ranks[0].tokens = {"all": 200}
    with pytest.raises((UsageError, rk.errors.PlanError), match=message):
        run(session(client).plan(asked))


def test_nothing_was_observed(client: FakeClient) -> None:
    for work in (session(client).stats(), session(client).plan({})):
        refused(work, 409, "no token was counted yet")


def test_a_mask(client: FakeClient) -> None:
    async def work() -> None:
        one = session(client)
        assert await one.mask() == {"removed": {}}
        found = await one.set_mask(PROFILE)
        assert client.ranks[0].masked == MASKED
        assert (found["mask"]["experts"], found["mask"]["layers"], found["mask"]["of"]) == (
            3,
            2,
            24,
        )
        assert found["layers"] == dict(zip(OURS, (1, 0, 2), strict=True))
        assert "computed again" in found["in_flight"]
        assert [name for name in client.calls if name in EXCHANGED] == EXCHANGED
        other = session(client)  # another API server of the same engine
        mask = await other.mask()
        assert mask["removed"] == {OURS[0]: [1], OURS[2]: [0, 7]}
        assert mask["source"] == found["mask"]["source"]
        profile = json.loads(await other.profile())
        assert profile["pruned_experts"] == [[1, 1], [3, 0], [3, 7]]
        assert (await one.clear_mask())["mask"] is None

    run(work())
    assert client.ranks[0].masked == {}
    refused(session(client).profile(), 409, "no experts are masked")


def test_ranks_mask_the_layers_that_they_hold(folder: Path) -> None:
    ranks = [Rank(facts(THEIRS[2:])), Rank(facts(THEIRS[:2]))]
    found = run(session(FakeClient(folder, ranks)).set_mask(PROFILE))
    assert [rank.masked for rank in ranks] == [{THEIRS[2]: [0, 7]}, {THEIRS[0]: [1]}]
    assert found["mask"]["experts"] == 3


def test_wrong_masks_reach_no_worker(client: FakeClient) -> None:
    refused(session(client).set_mask(b"{}"), 400, "nothing that masks can be made of")
    assert not set(client.calls) & set(EXCHANGED)


def test_a_mask_is_set_on_all_ranks_or_none(folder: Path) -> None:
    error = {"type": "UnsupportedModel", "message": "no room"}
    ranks = [Rank(), Rank()]
    client = FakeClient(folder, ranks)

    def failing(removed: Any, source: str = "") -> dict[str, Any]:
        return {"error": error} if removed else ranks[0].status()

    ranks[1].mask = failing  # type: ignore[method-assign]
    work = session(client).set_mask(PROFILE)
    refused(work, 409, r"no room \(rank 1 of 2\); no experts are masked now, on any rank")
    assert ranks[0].masked == {}
    assert client.calls[-2:] == ["reset_prefix_cache", "resume"]
    assert not client.paused


def test_a_mask_that_cannot_be_cleared(folder: Path) -> None:
    rank = Rank(refuses={"reap_mask": {"type": "KeyError", "message": "'x'"}})
    client = FakeClient(folder, [rank])
    refused(session(client).set_mask(PROFILE), 503, "clearing the mask failed, too .* restart")
    assert not client.paused


def test_a_prefix_cache_that_is_not_reset(client: FakeClient) -> None:
    answers = iter([False, True])
    client.cache_reset = lambda: next(answers)
    work = session(client).set_mask(PROFILE)
    refused(work, 503, "could not reset its prefix cache.* no experts are masked now")
    assert client.ranks[0].masked == {}
    assert not client.paused


def test_layers_that_cannot_be_observed(folder: Path) -> None:
    client = FakeClient(folder, [Rank(facts(refusal="its kernel routes; --moe-backend triton"))])
    refused(session(client).start(start()), 409, "cannot be observed: its kernel routes; --moe-ba")
    found = run(session(client).status())["layers"][OURS[0]]
    assert found["refusal"] == "its kernel routes; --moe-backend triton"


def test_groups_are_named_once(client: FakeClient) -> None:
    work = session(client).start(start(groups=["a", "b", "a"]))
    refused(work, 400, "field 'groups' names 'a' twice")


def test_a_model_that_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "new", "architectures": ["New"]}')
    with pytest.raises(UnsupportedModel, match="is unknown to transformers"):
        run(session(FakeClient(tmp_path)).status())


def test_refusals_of_workers(client: FakeClient) -> None:
    for kind, status in (("BackendUnavailable", 409), ("PlanError", 400), ("KeyError", 503)):
        client.ranks[0].refuses = {"reap_start": {"type": kind, "message": "that is why"}}
        refused(session(client).start(start()), status, "that is why$")


def test_a_start_that_one_rank_refuses_starts_none(folder: Path) -> None:
    ranks = [Rank(), Rank(refuses={"reap_start": {"type": "DataError", "message": "why"}})]
    refused(session(FakeClient(folder, ranks)).start(start()), 409, r"why \(rank 1 of 2\)")
    assert [rank.mode for rank in ranks] == ["off", "off"]


def test_a_start_that_all_ranks_refuse_leaves_them_as_they_were(client: FakeClient) -> None:
    one = session(client)
    run(one.start(start()))
    client.ranks[0].refuses = {"reap_start": {"type": "UsageError", "message": "other groups"}}
    refused(one.start(start()), 400, "other groups$")
    assert client.ranks[0].mode != "off"


def test_a_rank_that_has_stopped_observing(folder: Path) -> None:
    ranks = [Rank(), Rank(error="layer x: its hook was not called")]
    one = session(FakeClient(folder, ranks))
    assert run(one.status())["error"] == "rank 1: layer x: its hook was not called"
    refused(one.stats(), 409, "has ended itself: rank 1: layer x: its hook was not called")
    ranks[1].error, ranks[1].mode = None, "shadow"
    work = session(FakeClient(folder, ranks)).status()
    refused(work, 503, "mode is 'shadow' on rank 1 and 'off' on rank 0; stop and start again")


def test_questions_during_an_exchange_wait(client: FakeClient) -> None:
    """Of this API server, for their turn; of another, until the engine goes on."""

    async def work() -> None:
        one, other = session(client), session(client)
        await asyncio.gather(one.status(), other.status())
        work = (one.set_mask(PROFILE), one.status(), one.mask(), other.mask(), other.status())
        found = await asyncio.gather(*work)
        assert found[4]["mode"] == found[1]["mode"] == "off"

    run(work())


def test_engines_that_do_not_answer(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_PAUSED", 0.0)
    client.paused = True
    refused(session(client).status(), 409, "the engine sleeps or is paused")
    client.paused = False
    client.fails["reap_status"] = RuntimeError("line one\nTraceback: line two")
    refused(session(client).status(), 503, "failed in reap_status: 'line one'; see the server's")
    client.errored = True
    refused(session(client).status(), 503, "the engine has died; restart the server")
    client.fails, client.errored = {}, False
    monkeypatch.setattr(engine, "_SECONDS", 0.0)
    refused(session(client).status(), 503, "did not answer is_sleeping within 0 s")
    monkeypatch.undo()
    client.vllm_config.parallel_config.data_parallel_size = 2
    refused(session(client).status(), 409, "runs 2 engines .--data-parallel-size")


def save(client: FakeClient, saves: Any, name: str, **more: Any) -> Coroutine[Any, Any, Any]:
    client.ranks[0].tokens = {"all": 8}
    return session(client, saves).save({"name": name, "overwrite": False, **more})


def test_statistics_are_saved_in_the_folder(client: FakeClient, tmp_path: Path) -> None:
    path = run(save(client, tmp_path, "code.safetensors"))["path"]
    assert path == str(tmp_path / "code.safetensors")
    assert rk.SaliencyStats.load(path).layers[OURS[0]].tokens.tolist() == [8]
    refused(save(client, tmp_path, "code.safetensors"), 400, "exists .* or `overwrite`: true")
    assert run(save(client, tmp_path, "code.safetensors", overwrite=True))["path"] == path
    assert os.listdir(tmp_path) == ["code.safetensors"]


@pytest.mark.parametrize(
    "name",
    [
        *("", "x", ".safetensors", "../x.safetensors", "a/x.safetensors", "a\\x.safetensors"),
        *("/x.safetensors", "x.safetensors\0", "x.safetensors\n", f"{'x' * 190}.safetensors"),
    ],
)
def test_names_that_leave_the_folder(client: FakeClient, tmp_path: Path, name: str) -> None:
    refused(save(client, tmp_path, name, overwrite=True), 400, "field 'name' is")
    assert not os.listdir(tmp_path)


def test_links_are_not_followed(client: FakeClient, tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("mine")
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "dangling.safetensors").symlink_to(tmp_path / "new")
    (folder / "sub.safetensors").mkdir()
    for name in ("link", "dangling", "sub"):
        work = save(client, folder, f"{name}.safetensors", overwrite=True)
        refused(work, 400, "is no plain file")
    assert outside.read_text() == "mine"


def test_no_folder(client: FakeClient, tmp_path: Path) -> None:
    for given in (None, ""):
        refused(save(client, given, "x.safetensors"), 409, "REAP_STATS_FOLDER named no folder")
    gone = tmp_path / "gone"
    with pytest.raises(UsageError, match=r"REAP_STATS_FOLDER is .*gone, which is no folder that"):
        StatsFolder(str(gone))
    gone.mkdir()
    one = session(client, gone)
    gone.rmdir()
    client.ranks[0].tokens = {"all": 8}
    asked = {"name": "x.safetensors", "overwrite": False}
    refused(one.save(asked), 409, "gone, which is no longer a folder")


@pytest.mark.parametrize(
    ("number", "status"), [(errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EROFS, 409)]
)
def test_disks_that_refuse(
    client: FakeClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: int,
) -> None:
    def save_tensors(tensors: Any, path: Any, metadata: Any) -> None:
        if Path(path).parent == tmp_path:
            Path(path).write_bytes(b"a part")
            raise OSError(number, "refused")
        files.save_tensors(tensors, path, metadata)

    monkeypatch.setattr("reap_kernels.tensor_files.save_tensors", save_tensors)
    work = save(client, tmp_path, "x.safetensors")
    refused(work, status, r"x\.safetensors: cannot be saved \(refused\)")
    assert not os.listdir(tmp_path), "a partial file"
