"""The options of jobs that exchange files with other tools: converting, checking before serving."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reap_driver.interchange.formats import FORMATS, OWN
from reap_driver.workflow.fields import option, options, refused
from reap_driver.workflow.options import check_positive, trust_option
from reap_driver.workflow.single_options import overwrite_option, set_paths

_READ = (*OWN, *(one.name for one in FORMATS.values() if one.reads))
_WRITTEN = (*OWN, *(one.name for one in FORMATS.values() if one.writes))


@options
@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Converting statistics and plans from and to files of other tools.

    Example:
        >>> rd.ConvertOptions(source="plan.json", to="riy", out="profile.json").criterion
        'reap'
    """

    source: Any = option(
        metavar="SOURCE",
        positional=True,
        help="statistics, a plan, or a file of another tool",
    )
    to: str = option(
        metavar="FORMAT",
        help="what to write: stats or plan, which reap-kernels reads; "
        + "; ".join(f"{one.name}: {one.what}" for one in FORMATS.values() if one.writes),
    )
    out: str | Path | None = option(None, metavar="FILE", help="where to write it")
    from_: str | None = option(
        None,
        metavar="FORMAT",
        help=f"the format of SOURCE, where its content does not say: {', '.join(_READ)}",
    )
    model: str | Path | None = option(
        None,
        metavar="MODEL",
        help="the model that SOURCE is of, as checkpoint folder or hub id, of which only the "
        "configuration is read; files of other tools need it, as do formats with a row for every "
        "decoder layer (default for those: the one that SOURCE names)",
    )
    plan: Any = option(
        None,
        metavar="PLAN",
        help="with statistics as SOURCE: the plan whose pruned checkpoint is served",
    )
    criterion: str = option(
        "reap", metavar="NAME", help="that ranks experts; `plan --help` lists them"
    )
    ep: int | None = option(
        None, metavar="N", help="devices that share the experts out, for maps of them"
    )
    bits: float | None = option(
        None,
        metavar="B",
        help="average bits of the experts' weights, such as 3; those whose outputs weigh more get "
        "more",
    )
    trust_remote_code: bool = trust_option()
    overwrite: bool = overwrite_option()

    def __post_init__(self) -> None:
        set_paths(self)
        check_positive(self, "ep")
        _check_name("to", self.to, _WRITTEN)
        if self.from_ is not None:
            _check_name("from_", self.from_, _READ)
        if self.to in OWN:
            self._check_unused(())
            return
        wanted = FORMATS[self.to]
        self._check_unused(wanted.options)
        for name in wanted.needs:
            if name != "model" and getattr(self, name) is None:
                raise refused(f"`to={self.to}`: needs `{name}` besides")
        if self.out is None:
            raise refused("`out` is required: the file to write")
        if wanted.suffix and not str(self.out).endswith(wanted.suffix):
            raise refused(
                f"`out={self.out}`: the tool knows the format by the end of the name; end it with "
                f"{wanted.suffix}"
            )

    def _check_unused(self, used: tuple[str, ...]) -> None:
        """Raises OptionError for options that the format has no use for."""
        for name, usual in (("plan", None), ("criterion", "reap"), ("ep", None), ("bits", None)):
            value = getattr(self, name)
            if name not in used and value != usual:
                fits = [one.name for one in FORMATS.values() if name in one.options]
                shown = value if isinstance(value, str | int | float) else "..."
                raise refused(f"`{name}={shown}`: only with `to` as one of {', '.join(fits)}")


@options
@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Whether an engine would serve what a plan leaves, or a checkpoint.

    Example:
        >>> rd.CheckOptions(source="plan.json", serve="sglang", tp=4, ep=4).tp
        4
    """

    source: Any = option(
        metavar="SOURCE",
        positional=True,
        help="a plan, or a checkpoint as folder or hub id, of which only the configuration is read",
    )
    serve: Literal["vllm", "sglang"] = option(metavar="ENGINE", help="vllm or sglang")
    tp: int = option(1, metavar="N", help="its tensor-parallel size")
    ep: int = option(
        1,
        metavar="N",
        help="GPUs that share the experts out: for vLLM tensor-parallel size times data-parallel "
        "size, for SGLang its --ep-size",
    )
    model: str | Path | None = option(
        None,
        metavar="MODEL",
        help="with a plan: the model that it will be applied to (default: the one that it names)",
    )
    trust_remote_code: bool = trust_option()

    def __post_init__(self) -> None:
        set_paths(self)
        check_positive(self, "tp", "ep")


def _check_name(option: str, name: str, known: tuple[str, ...]) -> None:
    """Raises OptionError for what is no format."""
    if name not in known:
        raise refused(f"`{option}={name}`: no such format; choose one of {', '.join(known)}")
