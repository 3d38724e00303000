"""A client of the plugin's HTTP surface, with the standard library only: needs no vLLM."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from reap_driver.base.arguments import typed
from reap_driver.base.json_text import json_in_lines
from reap_driver.integrations.vllm.calls import KEY_VARIABLE, MAX_FILE, Calls
from reap_driver.integrations.vllm.engine.stats_bytes import stats_of
from reap_driver.planning.plan import Plan
from reap_kernels import SaliencyStats
from reap_kernels.documents import read_bytes
from reap_kernels.errors import PlanError
from reap_kernels.files import replaced
from reap_kernels.provenance import MAX_EXPERTS
from reap_kernels.schema import Anything, Int, Kind, ListOf, MapOf, OrNull, Record, Text

Mode = Literal["replace", "shadow"]
_COUNTS = MapOf(Int())
_IDS = ListOf(Int(0, MAX_EXPERTS - 1))
_NAME: Kind = OrNull(Text(1_000))
# What masks hide: `experts` of `of`, in `layers`, and what they were set from.
_MASK = OrNull(
    Record(
        optional={**dict.fromkeys(("experts", "layers", "of"), Int()), "source": _NAME}, open=True
    )
)
_LAYER = Record(
    optional={
        "num_experts": Int(1, MAX_EXPERTS),
        "top_k": Int(1, MAX_EXPERTS),
        "masked": Int(0, MAX_EXPERTS),
        "refusal": _NAME,
    },
    open=True,
)
STATUS = Record(
    {"mode": Text(choices=("off", "replace", "shadow")), "groups": _COUNTS, "mask": _MASK},
    {
        **dict.fromkeys(("model", "version", "vllm"), _NAME),
        **dict.fromkeys(("error", "note"), OrNull(Text())),
        **dict.fromkeys(("every", "tokens", "steps", "observed_steps"), OrNull(Int())),
        "not_counted": _COUNTS,
        "layers": MapOf(_LAYER),
    },
    open=True,
)
_SAVED = Record({"path": Text(10_000)}, open=True)
_MASKED = Record({"removed": MapOf(_IDS)}, {"source": _NAME}, open=True)
_ANY = MapOf(Anything())


class Server:
    """A vLLM server that runs with the plugin of reap-kernels.

    Args:
        url: of the server, such as http://127.0.0.1:8000.
        api_key: that the server was started with; None takes the variable VLLM_API_KEY, if it is
            set, as `vllm serve` does.
        timeout: seconds that a call may take. The server answers between two steps of the model.

    Raises:
        UsageError: the URL, the key or the timeout is none. Of all calls: the server takes no such
            argument, or asks for another API key; the message has the server's own sentence.
        BackendUnavailable: of all calls: nothing answers there, the plugin is not loaded there, or
            the server cannot do what is asked of it with this model or in this state.

    Example, with a server of the model on this machine:

    ```python
    from reap_driver.integrations.vllm.client import Server

    server = Server("http://127.0.0.1:8000")
    server.start(groups=["code", "chat"])
    ...  # requests with the header `X-Reap-Group: code`
    stats = server.stats("stats.safetensors")
    plan = server.plan(ratio=0.25)
    server.mask(plan)
    ```
    """

    @typed
    def __init__(self, url: str, api_key: str | None = None, timeout: float = 60.0) -> None:
        key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE) or None
        self._calls = Calls(url, key, timeout)

    def __repr__(self) -> str:
        return f"Server({self.url!r})"

    @property
    def url(self) -> str:
        """Of the server, without a slash at its end."""
        return self._calls.url

    @typed
    def start(
        self,
        mode: Mode = "replace",
        every: int = 1,
        groups: Sequence[str] = (),
        reset: bool = True,
    ) -> dict[str, Any]:
        """Begins to observe.

        Args:
            mode: `replace`: the layer's output is made from the observed outputs of the experts,
                which run once; `shadow`: it stays bit for bit what it is, and the experts run once
                more.
            every: observe each Nth step only.
            groups: names of calibration groups. A request's group is its header `X-Reap-Group`, or
                what comes before the first colon of its id; tokens of all others count as `all`.
            reset: begin with empty statistics; otherwise go on with those that are there.

        Returns:
            See `status`.
        """
        body = {"mode": mode, "every": every, "groups": list(groups), "reset": reset}
        return self._calls.json("POST", "start", STATUS, body)

    def stop(self) -> dict[str, Any]:
        """Ends observing; the statistics stay. Returns `status`."""
        return self._calls.json("POST", "stop", STATUS, {})

    def reset(self) -> dict[str, Any]:
        """Empties the statistics. Returns `status`."""
        return self._calls.json("POST", "reset", STATUS, {})

    def status(self) -> dict[str, Any]:
        """What the server observes and masks.

        Returns:
            `model`, `version` (of reap-kernels there), `vllm`; `mode` (`off`, `replace`, `shadow`),
            `every`; `groups` {name: tokens counted}, `tokens`, `not_counted` {reason: tokens},
            `steps`, `observed_steps`; `mask` (`experts` of `of`, in `layers`, from `source`) or
            None; `layers` {name: `num_experts`, `top_k`, `masked`, `refusal`}; `error`: why an
            observation has ended itself, and `note` on the version of vLLM, or None.
        """
        return self._calls.json("GET", "status", STATUS)

    @typed
    def stats(self, out: str | os.PathLike[str] | None = None) -> SaliencyStats:
        """The statistics so far, as `reap-kernels observe` makes them.

        Args:
            out: file to save them in, which is replaced; None saves none.

        Raises:
            DataError: what came is damaged, or of another version of the format.
        """
        content = self._calls.content("GET", "stats", limit=MAX_FILE)
        found = stats_of(content)
        if out is not None:
            with replaced(out) as temporary:
                temporary.write_bytes(content)
        return found

    @typed
    def save(self, name: str, overwrite: bool = False) -> str:
        """Saves the statistics on the server, in the folder that its REAP_STATS_FOLDER names.

        Args:
            name: of the file, without a folder.
            overwrite: replace a file of this name.

        Returns:
            The path there.
        """
        body = {"name": name, "overwrite": overwrite}
        return str(self._calls.json("POST", "stats/save", _SAVED, body)["path"])

    def plan(self, **options: Any) -> Plan:
        """The plan that the server makes from its statistics.

        Args:
            options: `ratio`, `criterion`, `weights` and others, as of `reap_driver.plan`.
        """
        content = self._calls.content("POST", "plan", options)
        return Plan.parse(content, f"from {self.url}/reap/plan")

    @typed
    def mask(self, plan: str | os.PathLike[str] | Plan | Mapping[str, Any]) -> dict[str, Any]:
        """Removes experts from the running model, before the router chooses; replaces what was
        masked before.

        Args:
            plan: a plan; a file of one, of masks (`apply --as-masks`) or of a Reap-It-Yourself
                profile; or the content of a JSON file of these.

        Returns:
            `mask` (as in `status`), `layers` {name: masked experts} and `in_flight`: what requests
            that are running now see of it.

        Raises:
            PlanError: the file cannot be read; or the server refuses what it says, which may be
                made for another model or leave a router too few experts.
        """
        return self._calls.json("POST", "mask", _ANY, _content(plan), PlanError)

    def unmask(self) -> dict[str, Any]:
        """Brings all experts back. Returns what `mask` does."""
        return self._calls.json("DELETE", "mask", _ANY)

    def masked(self) -> dict[str, Any]:
        """The mask in force: `source`, and `removed` {layer: ids}, empty where there is none."""
        return self._calls.json("GET", "mask", _MASKED)

    def profile(self) -> dict[str, Any]:
        """The mask in force as a Reap-It-Yourself profile of version 1."""
        return self._calls.json("GET", "profile", _ANY)


def _content(plan: str | os.PathLike[str] | Plan | Mapping[str, Any]) -> bytes:
    """A plan as it is sent.

    Raises:
        PlanError: its file cannot be read, or it could not be read again.
    """
    if isinstance(plan, str | os.PathLike):
        try:
            return read_bytes(plan)
        except ValueError as error:
            raise PlanError(
                f"{os.fspath(plan)}: {error}; give a plan, masks or a profile"
            ) from error
    content = plan.check() if isinstance(plan, Plan) else dict(plan)
    try:
        return json_in_lines(content).encode()
    except (TypeError, ValueError) as error:
        raise PlanError(f"the plan holds what JSON cannot ({error}); give plain values") from error
