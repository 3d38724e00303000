"""The guide lists the routes, fields and answers that the plugin has, and no others."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI

from reap_driver.integrations.vllm.server import bodies, refusals
from reap_driver.integrations.vllm.server.endpoints import ReapEndpoints
from reap_driver.integrations.vllm.server.status import Vllm, shown_status
from tests.interop.vllm.installed import ROOT

PAGE = (ROOT / "docs/guides/live.md").read_text(encoding="utf-8")
BODIES = {
    "POST /reap/start": bodies.START,
    "POST /reap/stats/save": bodies.SAVE,
    "POST /reap/plan": bodies.PLAN,
}


def table(after: str) -> list[list[str]]:
    """The cells of the first table behind a line of the page, without its head."""
    lines = PAGE.split(f"\n{after}", 1)[1].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


ROUTES = {row[0].strip("`"): row[1] for row in table("## Routes")}


def test_the_routes_are_those_of_the_server() -> None:
    app = FastAPI()
    ReapEndpoints().attach_router(app)
    found = {
        f"{method.upper()} {path}"
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    }
    assert set(ROUTES) == found
    assert len(ROUTES) == 11


@pytest.mark.parametrize("route", BODIES)
def test_the_fields_of_a_body_are_those_that_are_read(route: str) -> None:
    body = BODIES[route]
    named = set(re.findall(r"`(\w+)`", re.sub(r"\(`[^`]*`\)", "", ROUTES[route])))
    assert named == {*body.kind.fields, *body.kind.optional}
    for name, value in body.defaults.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        assert re.search(rf"`{name}` \(`?{re.escape(shown)}`?\)", ROUTES[route]), name


def test_the_fields_of_a_status_are_those_that_are_answered() -> None:
    named = {name for row in table("A status:") for name in re.findall(r"`(\w+)`", row[0])}
    status = {
        **dict.fromkeys(("every", "steps", "observed_steps"), 1),
        **{name: {} for name in ("tokens", "not_counted", "masked")},
        "mode": "off",
        "error": None,
    }
    model = SimpleNamespace(name="model", layers=[], theirs={}, facts={})
    assert named == set(shown_status(status, model, Vllm("0.32.0", None)))


def test_every_status_code_that_errors_have_is_listed() -> None:
    named = {int(code) for row in table("An error is") for code in re.findall(r"\d{3}", row[0])}
    used = {*refusals._KINDS, *(status for _, status in refusals._STATUS)}
    source = Path(refusals.__file__).parent
    for path in source.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        used |= {int(code) for code in re.findall(r"(?:Refused|refusal)\(\s*(\d{3})", text)}
    assert named == {*used, 405}  # where there is a route, but not by this method
