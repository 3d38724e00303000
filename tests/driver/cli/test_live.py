"""The command `live`: its actions as scripts use them, what it prints, and what it refuses."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import reap_driver as rd
from tests.driver.cli.conftest import Run
from tests.driver.integrations.vllm.fake_server import (
    FakeServer,
    names,
    serving,
    statistics,
    status,
)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A server that observes; the working folder is `tmp_path`."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    with serving() as server:
        statistics(groups=("all", "code")).save("sent")
        groups = {"all": 36, "code": 36}
        for route in ("GET status", "POST start", "POST reset"):
            server.tell(route, status(groups=groups))
        server.tell("POST stop", status("off", groups=groups))
        server.tell("GET stats", Path("sent").read_bytes())
        server.tell("GET mask", {"removed": {}})
        server.tell("DELETE mask", {"removed": {}})
        yield server


def test_the_picture_is_printed_where_no_terminal_is(run: Run, fake: FakeServer) -> None:
    for more in ([], ["--once"]):
        done = run("live", fake.url, *more)
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith(f"org/tiny-moe at {fake.url} (vLLM 0.32.0")
        assert "    1  ▂▃▄▄▅▅▆▆       4     0  16.7 %\n" in done.out
        assert "\x1b" not in done.out


def test_the_picture_in_numbers(run: Run, fake: FakeServer) -> None:
    found = run("live", fake.url, "--ratio", 0.25, "--criterion", "frequency", "--json").json
    assert found["command"] == "live"
    assert found["plan"] == {"criterion": "frequency", "ratio": 0.25, "near": 0}
    assert found["strips"][names(1)[0]]["kept"] == 6
    assert found["status"]["tokens"] == 36


def test_the_status_is_the_picture(run: Run, fake: FakeServer) -> None:
    once = run("live", fake.url, "--once", "--ratio", 0.25)
    for words in (["status", "--ratio", 0.25], ["--ratio", 0.25, "status"]):
        done = run("live", fake.url, *words)
        assert (done.code, done.out) == (0, once.out)
    found = run("live", fake.url, "status", "--json").json
    assert (found["action"], found["status"]["tokens"], found["plan"]["ratio"]) == (
        "status",
        36,
        0.5,
    )


def test_an_observation_that_ended_itself(run: Run, fake: FakeServer) -> None:
    why = "a layer was not called in a step"
    for route in ("GET status", "POST stop"):
        fake.tell(route, status("off", error=why))
    fake.refuse("GET stats", 409, f"the observation has ended itself: {why}")
    done = run("live", fake.url, "stop")
    assert (done.code, done.err) == (0, f"note: the observation had ended itself: {why}\n")
    done = run("live", fake.url, "status")
    assert done.code == 0
    assert "note      no statistics: http" in done.out
    assert f"note      {why}\n" in done.out


def test_observing_and_its_end(run: Run, fake: FakeServer) -> None:
    url = fake.url
    words = ["start", "--mode", "shadow", "--every", 8, "--groups", "code,chat", "--no-reset"]
    done = run("live", url, *words)
    said = "72 tokens counted in the groups all, code\n"
    assert (done.code, done.out) == (0, f"observing (replace); {said}")
    assert json.loads(fake.asked[0].body) == {
        "mode": "shadow",
        "every": 8,
        "groups": ["code", "chat"],
        "reset": False,
    }
    assert run("live", url, "stop").out == f"not observing; {said}"
    assert run("live", url, "reset", "-q").out == ""
    found = run("live", url, "start", "--json").json
    assert (found["action"], found["url"], found["status"]["every"]) == ("start", url, 1)


def test_statistics_are_saved_here(run: Run, fake: FakeServer) -> None:
    done = run("live", fake.url, "save", "stats.safetensors")
    assert done.code == 0
    assert done.out.startswith("wrote stats.safetensors: 72 tokens in 2 layers; next: reap-kernels")
    assert Path("stats.safetensors").read_bytes() == Path("sent").read_bytes()
    assert run("plan", "stats.safetensors", "--out", "plan.json").code == 0
    again = run("live", fake.url, "save", "stats.safetensors")
    assert again.code == 3
    assert "stats.safetensors" in again.error
    found = run("live", fake.url, "save", "stats.safetensors", "--overwrite", "--json").json
    assert (found["tokens"], found["groups"], found["there"]) == (72, ["all", "code"], False)


def test_statistics_are_saved_there(run: Run, fake: FakeServer) -> None:
    fake.tell("POST stats/save", {"path": "/srv/stats/code.safetensors"})
    done = run("live", fake.url, "save", "code.safetensors", "--there", "--overwrite")
    assert done.out == "wrote /srv/stats/code.safetensors on the server\n"
    assert json.loads(fake.asked[0].body) == {"name": "code.safetensors", "overwrite": True}


def test_a_plan_is_that_of_the_command_plan(run: Run, fake: FakeServer) -> None:
    words = ["--ratio", 0.25, "--protect", "0:0", "--weights", "all=1,code=2"]
    done = run("live", fake.url, "plan", *words, "--out", "live.json")
    assert done.code == 0, done.err
    assert "plan by reap: keeps 6 of 8 experts in each of 2 layers; 1 of them protected" in done.out
    assert f"wrote live.json; next: reap-kernels live {fake.url} mask live.json" in done.out
    assert run("plan", "sent", *words, "--out", "plan.json").code == 0
    assert Path("live.json").read_bytes() == Path("plan.json").read_bytes()
    assert run("live", fake.url, "plan", "--out", "live.json").code == 3
    found = run("live", fake.url, "plan", "--keep", 2, "--out", "two.json", "--json").json
    assert found["removed"] == 12


def test_masks(run: Run, fake: FakeServer) -> None:
    rd.make_plan(rd.score(statistics()), 0.25).save("plan.json")
    fake.tell("POST mask", {"mask": {"experts": 4}, "in_flight": "they are computed again"})
    fake.tell("GET mask", {"removed": {name: [0, 1] for name in names(2)}, "source": "a plan"})
    done = run("live", fake.url, "mask", "plan.json")
    assert done.out == "4 experts are masked in 2 layers; `mask off` brings them back\n"
    assert done.err == "note: they are computed again\n"
    assert fake.asked[0].body == Path("plan.json").read_bytes()
    fake.tell("GET mask", {"removed": {}})
    assert run("live", fake.url, "mask", "off").out == "no experts are masked\n"
    assert fake.asked[2].method == "DELETE"
    assert run("live", fake.url, "mask", "off", "--json").json["removed"] == {}
    missing = run("live", fake.url, "mask", "./off")
    assert missing.code == 3
    assert "off: cannot be read (No such file or directory)" in missing.error


def test_the_sentence_of_the_server(run: Run, fake: FakeServer) -> None:
    Path("plan.json").write_text("{}")
    fake.refuse("POST mask", 400, "layer 3 would keep 1 of 8 experts, fewer than its router takes")
    done = run("live", fake.url, "mask", "plan.json", "--json")
    assert done.code == 3
    assert done.error.endswith("keep 1 of 8 experts, fewer than its router takes")
    assert done.json["error"]["type"] == "PlanError"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--interval", "0"], "'0' is no number of seconds above 0"),
        (["--timeout", "soon"], "'soon' is no number of seconds above 0"),
        (["--ratio", "1"], "'1' is no number above 0 and below 1"),
        (["--criterion", "best"], "--criterion: "),
        (["prune"], "invalid choice: 'prune'"),
        (["mask"], "the following arguments are required: FILE"),
        (["plan"], "the following arguments are required: --out"),
        (["start", "--every", "0"], "is not a whole number above 0"),
        (["start", "--mode", "masks"], "invalid choice: 'masks'"),
        (["plan", "--ratio", "2", "--out", "p"], "--ratio 2: give a number above 0"),
        (["--once", "stop"], "--once: of the view; leave it out\n"),
        (["--interval", "1", "status"], "--interval: of the view; leave it out\n"),
        (["status", "--criterion", "best"], "--criterion: "),
        (["--ratio", "0.5", "plan", "--out", "p"], "--ratio: of the view; leave it out, or put"),
    ],
)
def test_wrong_usage(run: Run, fake: FakeServer, words: list[str], message: str) -> None:
    done = run("live", fake.url, *words)
    assert done.code == 2
    assert message in f"{done.error}\n"
    assert done.err.startswith("usage: reap-kernels live URL")
    assert [one for one in fake.asked if one.method == "POST"] == []


def test_urls_that_are_none(run: Run) -> None:
    done = run("live", "localhost:8000")
    assert done.code == 3
    assert "give scheme, host and port of the server" in done.error


def test_passwords_are_not_repeated(run: Run) -> None:
    done = run("live", "http://user:secret@host")
    assert done.code == 3
    assert "the URL has a user's name or password" in done.error
    assert "secret" not in done.out + done.err
