"""Converting: statistics and plans from and to files of other tools."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.interchange.content import ModelFacts, Source
from reap_driver.interchange.formats import FORMATS, OWN
from reap_driver.interchange.known import known_formats
from reap_driver.planning.plan import Plan
from reap_driver.workflow.errors import OptionError
from reap_driver.workflow.exchange_jobs import ConvertOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.outputs import check_file, inputs_of
from reap_driver.workflow.plan import Planned, plan_of
from reap_driver.workflow.results import Result
from reap_kernels import SaliencyStats
from reap_kernels.errors import DataError
from reap_kernels.files import replaced
from reap_kernels.model_match import differences

_WORDS = {"stats": "statistics", "plan": "a plan"}


@dataclass(frozen=True, repr=False)
class Converted(Result):
    """Statistics or a plan that came from, or went to, a file of another tool.

    Attributes:
        content: the statistics or the plan.
        from_, to: formats, "stats" and "plan" for those of reap-kernels.
        out: the file that was written; None: none.

    Example:
        >>> rd.convert(plan, "riy", out="riy.json").facts()["to"]
        'riy'
    """

    content: SaliencyStats | Plan
    from_: str
    to: str
    out: Path | None = None

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        out = {} if self.out is None else {"out": str(self.out)}
        return {**out, "from": self.from_, "to": self.to, "notes": list(self.notes)}

    def describe(self) -> str:
        """See `Result`."""
        what = FORMATS[self.to].what if self.to in FORMATS else _WORDS[self.to]
        return f"wrote {self.out}: {what}" if self.out else f"converted {self.from_} to {what}"


def convert(options: ConvertOptions, listener: Listener | None = None) -> Converted:
    """Reads and writes; see `reap_driver.convert`."""
    heard = Collector(listener)
    out = options.out if isinstance(options.out, Path) else None
    if out is not None:
        check_file(out, overwrite=options.overwrite, inputs=inputs_of(options, out))
    origin = _origin(options)
    if origin == options.to:
        raise OptionError(f"`to={options.to}`: SOURCE is of this format; choose another")
    holds = FORMATS[origin].holds if origin in FORMATS else origin
    wanted = options.to if options.to in OWN else FORMATS[options.to].made_from
    if holds != wanted:
        remedy = "plan first" if wanted == "plan" else "give the statistics that it was made from"
        raise OptionError(
            f"`to={options.to}`: is made from {_WORDS[wanted]}, and SOURCE has {_WORDS[holds]}; "
            f"{remedy}"
        )
    content, model = _read(options, origin)
    notes = content.notes if isinstance(content, Plan) else content.provenance.get("notes", [])
    for note in notes if origin in FORMATS else ():
        heard.note(note)
    if out is not None:
        for note in _write(options, content, model, out):
            heard.note(note)
    found = Converted(heard.notes, content, origin, options.to, out)
    heard.say(found.describe())
    return found


def _origin(options: ConvertOptions) -> str:
    """The format of what is converted."""
    source = options.source
    if isinstance(source, SaliencyStats | Plan | Planned):
        if options.from_ is not None:
            raise OptionError(f"`from_={options.from_}`: only with the name of a file as SOURCE")
        return "stats" if isinstance(source, SaliencyStats) else "plan"
    if not isinstance(source, str | Path):
        raise OptionError(
            f"SOURCE is a {type(source).__name__}; give the name of a file, statistics or a plan"
        )
    if options.from_ is not None:
        return options.from_
    found = known_formats(Path(source))
    if len(found) == 1:
        return found[0]
    names = ", ".join(found or [*OWN, *(one.name for one in FORMATS.values() if one.reads)])
    raise OptionError(
        f"{source}: its content does not say which format it has; give it by `from_`, one of "
        f"{names}"
    )


def _read(options: ConvertOptions, origin: str) -> tuple[SaliencyStats | Plan, ModelFacts]:
    """The statistics or the plan, and the model that they are of."""
    if origin in FORMATS:
        if options.model is None:
            raise OptionError(
                f"SOURCE is a file of another tool ({origin}), which does not say how the model "
                "routes; give the model by `model`"
            )
        model = _inspected(options, None, "")
        read: SaliencyStats | Plan = FORMATS[origin].code().read(Path(options.source), model)
        return read, model
    source = options.source
    if origin == "plan":
        plan = plan_of(source)
        return plan, _facts(options, plan.record, "plan")
    stats = source if isinstance(source, SaliencyStats) else SaliencyStats.load(source)
    return stats, _facts(options, stats.provenance, "statistics")


def _facts(options: ConvertOptions, record: Mapping[str, Any], what: str) -> ModelFacts:
    """The model that statistics or a plan of ours are of, looked up where that is needed."""
    needs = FORMATS[options.to].needs if options.to in FORMATS else ()
    if options.model is not None or "model" in needs:
        return _inspected(options, record, what)
    return ModelFacts(record)


def _inspected(options: ConvertOptions, record: Mapping[str, Any] | None, what: str) -> ModelFacts:
    """The model, from its configuration."""
    # With it come transformers, which the other conversions do without.
    from reap_driver.workflow.inspection import inspect_model
    from reap_driver.workflow.plan_sizes import model_of

    trust = options.trust_remote_code
    if record is None:
        model = inspect_model(str(options.model), trust_remote_code=trust)
    else:
        model = model_of(options.model, record, trust=trust, what=what)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return ModelFacts(model.provenance, layers if isinstance(layers, int) else None)


def _write(
    options: ConvertOptions, content: SaliencyStats | Plan, model: ModelFacts, out: Path
) -> list[str]:
    """Writes the file; returns what to know of it."""
    if options.to in OWN:
        content.save(out)
        return []
    wanted, kept = FORMATS[options.to], content if isinstance(content, Plan) else None
    if kept is None and options.plan is not None:
        kept = plan_of(options.plan)
        found = differences(kept.record, model.record)
        if found.deciding:
            raise DataError(
                f"the plan is not of the model of the statistics: {', '.join(found.deciding)}; "
                "give one that was made from them"
            )
    stats = content if isinstance(content, SaliencyStats) else None
    source = Source(model, stats, kept, options.criterion, options.ep, options.bits)
    with replaced(out) as temporary:
        notes: list[str] = wanted.code().write(temporary, source)
    if wanted.named and out.name != wanted.named:
        notes.append(f"the tool looks for this file by the name {wanted.named}")
    return notes
