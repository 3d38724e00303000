"""Options that several jobs share: what each does, its default and its unit, in one place.

An option that is one word on the command line is one word here: `--seq-len 512` is `seq_len=512`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from reap_driver.base.quantities import whole
from reap_driver.planning.criteria import CRITERIA, criterion_named
from reap_driver.workflow.fields import option, options, refused

SEQ_LEN = 2048
# What `protect` takes: SUPER, a layer and ids in it, or a file of them.
SUPER = "super"
Protected = str | tuple[str, tuple[int, ...]] | Path

DATA, RUN, JOURNAL = "data", "running the model", "journal"
_RANK, _BUDGET = "which experts go", "how many experts each layer loses"
_WRITE = "writing the checkpoint"


def trust_option(group: str = "") -> Any:
    """The field `trust_remote_code`, of jobs that run a model and of those that only read it."""
    return option(
        False,
        group=group,
        help="run model or tokenizer code that comes with the checkpoint; read it first",
    )


def check_positive(given: Any, *names: str) -> None:
    """Raises OptionError unless these options are above 0, or not given."""
    for name in names:
        value = getattr(given, name)
        if value is not None and value < 1:
            raise refused(f"`{name}={value}`: give a whole number above 0")


def read_bytes(given: Any, name: str) -> None:
    """Replaces the text of an option that is a number of bytes, such as "5GB", by the number."""
    _read(given, name, "B", "a size such as 5GB, 800MB or 4GiB")


def read_count(given: Any, name: str) -> None:
    """Replaces the text of an option that is a count, such as "24M", by the number."""
    _read(given, name, "", "a whole number such as 24M or 65536")


def _read(given: Any, name: str, unit: str, expected: str) -> None:
    text = getattr(given, name)
    if isinstance(text, str):
        value = whole(text, unit)
        if value is None:
            raise refused(f"`{name}={text}`: not {expected}")
        object.__setattr__(given, name, value)
    check_positive(given, name)


@options
@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Calibration data, and how its records become sequences.

    Example:
        >>> rd.DataOptions(data="code.jsonl:100", seq_len=256).sources
        ('code.jsonl:100',)
    """

    data: str | Path | Sequence[str | Path] = option(
        (),
        metavar="[GROUP=]SOURCE[:N]",
        group=DATA,
        recipe=False,
        help="a .jsonl, .parquet or .txt file, compressed or not, a folder of them, or a data set "
        "of the hub, owner/name[subset](split); :N takes a random sample of N records, :2Mtok one "
        "of 2 million tokens; GROUP names the statistics (default: the file's name); several "
        "sources can be given",
    )
    recipe: str | Path | Sequence[str | Path] = option(
        (),
        metavar="FILE",
        group=DATA,
        recipe=False,
        help="sources and values of options in a .yaml or .json file, or a recipe that comes with "
        "the package, by name (`reap-kernels recipe` lists them); options that are given come "
        "first",
    )
    packing: Literal["concat", "isolated", "none"] = option(
        "concat",
        group=DATA,
        help="how documents make sequences: concat, end to end, attention crossing their "
        "boundaries as in the reference implementation; isolated, the same but kept apart, where "
        "the model can; none, a sequence for every document",
    )
    seq_len: int | None = option(
        None,
        metavar="L",
        group=DATA,
        needs={"packing": ("concat", "isolated")},
        help=f"tokens in a sequence (default: {SEQ_LEN}, or the model's maximum if that is less)",
    )
    max_len: int | None = option(
        None,
        metavar="L",
        group=DATA,
        needs={"packing": ("none",)},
        help="with `packing='none'`: tokens after which a document is cut off (same default)",
    )
    seed: int = option(0, group=DATA, help="of the samples")
    answers_only: bool = option(
        False,
        group=DATA,
        help="count only what the assistant says, or the answer to an instruction or prompt; the "
        "rest is read, not counted",
    )
    chat_template: str | Path | None = option(
        None,
        metavar="FILE",
        group=DATA,
        help="use this chat template instead of the tokenizer's: a .jinja file, or a .json file "
        "that has it as `chat_template`, such as another model's tokenizer_config.json",
    )
    enable_thinking: bool | None = option(
        None, group=DATA, help="for chat templates that know it (default: as the template has it)"
    )
    skip_bad: bool = option(
        False,
        group=DATA,
        help="leave out records that are malformed or that the chat template refuses, and count "
        "them, instead of ending",
    )
    cache: bool = option(
        True,
        group=DATA,
        recipe=False,
        help="tokenize again, and keep nothing for the next run",
    )

    def __post_init__(self) -> None:
        for name in ("data", "recipe"):
            value = getattr(self, name)
            one = isinstance(value, str | Path)
            object.__setattr__(self, name, tuple(map(str, [value] if one else value)))
        check_positive(self, "seq_len", "max_len")
        apart = self.packing == "none"
        if self.max_len is not None and not apart:
            raise refused(
                f"`max_len={self.max_len}`: only with `packing='none'`; packed sequences have "
                "`seq_len` tokens"
            )
        if self.seq_len is not None and apart:
            raise refused(
                f"`seq_len={self.seq_len}`: not together with `packing='none'`, where a sequence "
                "is a document; give `max_len` to cut long ones"
            )

    @property
    def given(self) -> bool:
        """Whether there is any source."""
        return bool(self.data or self.recipe)

    @property
    def sources(self) -> tuple[str, ...]:
        """`data` as a tuple of texts, which it is once checked."""
        return cast("tuple[str, ...]", self.data)

    @property
    def recipes(self) -> tuple[str, ...]:
        """`recipe` as a tuple of texts, which it is once checked."""
        return cast("tuple[str, ...]", self.recipe)


@options
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how a model runs.

    Example:
        >>> rd.RunOptions(device="cpu", dtype="float32").batch_size is None  # as many as fit
        True
    """

    batch_size: int | None = option(
        None,
        metavar="B",
        group=RUN,
        help="sequences at a time (with `packing='none'`: as many documents as have their tokens): "
        "a whole number, or auto (default) for as many as give 256 rows per expert on average and "
        "a GPU 16384 tokens, within half of the memory that is free once the model is loaded; "
        "another size changes rounding only: the model's own, and the sums' (about 1e-12)",
    )
    device: str = option(
        "auto",
        group=RUN,
        help="cpu, cuda, cuda:1, ...; auto is a GPU where there is one, each rank its own",
    )
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = option(
        None,
        metavar="MAP",
        group=RUN,
        help="spread the model over GPUs, main memory and disk as accelerate does by this name: "
        "auto, balanced, balanced_low_0 or sequential; one sequence at a time unless `batch_size` "
        "says more",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", group=RUN, help="of the weights in memory; auto: as in the checkpoint"
    )
    backend: str | None = option(
        None,
        group=RUN,
        help="kernels to use, without falling back; `reap-kernels doctor` lists them",
    )
    stream: Literal["auto", "always", "never"] = option(
        "auto",
        group=RUN,
        help="hold one decoder layer in memory at a time, each read once for all data; auto: where "
        "the whole model would take more than 90 % of the memory that is free",
    )

    trust_remote_code: bool = trust_option(RUN)

    def __post_init__(self) -> None:
        check_positive(self, "batch_size")
        if self.device_map is not None and (self.device != "auto" or self.stream == "always"):
            raise refused(
                f"`device_map={self.device_map}`: not together with `device` or "
                "`stream='always'`; a map says where every layer is"
            )


@options
@dataclass(frozen=True, kw_only=True)
class JournalOptions:
    """What is kept while a model is observed, so that an interrupted run can go on.

    Example:
        >>> rd.JournalOptions(journal_every=8).resume
        False
    """

    resume: bool | Literal["auto"] = option(
        False,
        group=JOURNAL,
        about="Statistics and position are kept beside the output, in OUT.journal, until it is\n"
        "written: after each decoder layer of a streamed model, after batches of a resident one.",
        help="go on where an interrupted run of the same command stopped; the outcome has the bits "
        "of a run that was never interrupted. `resume='auto'` also begins where there is nothing "
        "to go on from, and does nothing where this command has completed its output: for jobs "
        "that are started again with one fixed command",
    )
    journal_every: int | None = option(
        None,
        metavar="N",
        group=JOURNAL,
        help="write it every N layers or batches (default: as often as takes less than 5 % of the "
        "time)",
    )
    journal: bool = option(True, group=JOURNAL, help="write none; Ctrl-C ends at once")

    def __post_init__(self) -> None:
        check_positive(self, "journal_every")
        if self.resume and not self.journal:
            raise refused(
                f"`resume={self.resume}`: not together with `journal=False`, which leaves none"
            )


@options
@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Which experts go.

    Example:
        >>> rd.RankOptions(ratio=0.25, protect="3:17,40").protected
        (('3', (17, 40)),)
    """

    ratio: float = option(0.5, group=_RANK, help="share of experts to remove, above 0 and below 1")
    criterion: str = option(
        "reap",
        metavar="NAME",
        group=_RANK,
        help="what experts are ranked by; one of "
        + "; ".join(f"{name}: {known.formula}" for name, known in CRITERIA.items())
        + "; S(b,alpha,p): n^-b sum g^alpha ||f||^p; random:SEED: by chance, to compare with",
    )
    weights: Mapping[str, float] | None = option(
        None,
        metavar="GROUP=W,...",
        group=_RANK,
        help="count the groups as if their tokens had these shares (default: as observed)",
    )
    protect: str | Path | Mapping[str, Collection[int]] | Sequence[Any] = option(
        (),
        metavar="WHAT",
        group=_RANK,
        help="experts that stay, one or several of: super, those with extreme activations (above "
        "the 99.5th percentile and a tenth of the largest); LAYER:ID,ID, experts by id; a JSON or "
        "YAML file {LAYER: [ID, ...]}",
    )

    def __post_init__(self) -> None:
        try:
            criterion_named(self.criterion)
        except ValueError as error:
            raise refused(f"`criterion`: {error}") from error
        given = self.protect
        if isinstance(given, Mapping):
            given = [(layer, tuple(ids)) for layer, ids in given.items()]
        listed = [given] if isinstance(given, str | Path) else given
        object.__setattr__(self, "protect", tuple(map(_protected, listed)))

    @property
    def protected(self) -> tuple[Protected, ...]:
        """`protect` as a tuple, which it is once checked."""
        return cast("tuple[Protected, ...]", self.protect)


def _protected(given: Any) -> Protected:
    """`super`, LAYER:ID,ID or a JSON or YAML file."""
    if given == SUPER or isinstance(given, tuple | Path):
        return given
    if isinstance(given, str) and (found := re.fullmatch(r"(.+):(\d+(?:,\d+)*)", given)):
        return found[1], tuple(int(number) for number in found[2].split(","))
    if isinstance(given, str) and Path(given).suffix in (".json", ".yaml", ".yml"):
        return Path(given)
    raise refused(
        f"`protect`: {given!r} is not super, LAYER:ID,ID such as 3:17,40, or a .json or .yaml file"
    )


def check_resume(resume: bool | str, out: Any, what: str) -> None:
    """Raises OptionError for a run that is to be resumed and writes nothing."""
    if resume and out is None:
        raise refused(f"`resume={resume}`: needs `out`, beside which the {what} is")


_LAYERS = """\
LAYER is the name of an experts module, the number in it, or a pattern such as '*.3.*'.
Transformers and serving engines read one number of experts for all layers, so every
choice here but the default makes a checkpoint they cannot load as it is."""


@options
@dataclass(frozen=True, kw_only=True)
class AllocationOptions:
    """How what is removed is shared out among layers.

    Example:
        >>> rd.AllocationOptions(allocation="global", normalize="max").normalize
        'max'
    """

    allocation: Literal["uniform", "global"] = option(
        "uniform",
        group=_BUDGET,
        about=_LAYERS,
        help="uniform: the same share of each layer; global: the lowest scores of all layers "
        "together, but never more than a router can spare",
    )
    normalize: Literal["mean", "max", "none"] | None = option(
        None,
        group=_BUDGET,
        needs={"allocation": ("global",)},
        help="with `allocation='global'`: divide each layer's scores by their mean (default) or "
        "maximum before comparing layers, or compare them as they are",
    )

    def __post_init__(self) -> None:
        if self.normalize is not None and self.allocation != "global":
            raise refused(
                f"`normalize={self.normalize}`: only with `allocation='global'`, which compares "
                "layers"
            )


@options
@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """Layers that lose another share of their experts than the others.

    Example:
        >>> rd.BudgetOptions(layer_ratios={"3": 0.25}, skip_last=1).skip_last
        1
    """

    layer_ratios: str | Path | Mapping[str, float] | None = option(
        None,
        metavar="FILE",
        group=_BUDGET,
        about=_LAYERS,
        help="JSON or YAML {LAYER: RATIO} of layers that lose another share, 0 for none, as for "
        "layers that no token reached; of several that fit a layer the last counts; the other "
        "layers lose `ratio` all the same",
    )
    skip_first: int = option(
        0,
        metavar="N",
        group=_BUDGET,
        help="keep all experts of the first N MoE layers; the others lose no more for it",
    )
    skip_last: int = option(
        0,
        metavar="N",
        group=_BUDGET,
        help="keep all experts of the last N MoE layers; the others lose no more for it",
    )

    def __post_init__(self) -> None:
        if isinstance(self.layer_ratios, str):
            object.__setattr__(self, "layer_ratios", Path(self.layer_ratios))
        for name in ("skip_first", "skip_last"):
            if getattr(self, name) < 0:
                raise refused(f"`{name}={getattr(self, name)}`: give 0 or more")


@options
@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How a checkpoint is written.

    Example:
        >>> rd.WriteOptions(shard_size="5GB").shard_bytes
        5000000000
    """

    mtp: Literal["drop", "keep"] = option(
        "drop",
        group=_WRITE,
        help="multi-token-prediction layers: leave them out, or keep them where they have no "
        "experts of their own",
    )
    shard_size: int | str | None = option(
        None,
        metavar="SIZE",
        group=_WRITE,
        help="largest weight file, in bytes or such as 5GB (default: as the source is divided)",
    )
    non_uniform: bool = option(
        False,
        group=_WRITE,
        help="write a checkpoint whose layers keep different numbers of experts, where the plan "
        "says so; reap-kernels and the load_pruned.py in the output load it, transformers' own "
        "from_pretrained, vLLM and SGLang do not",
    )

    def __post_init__(self) -> None:
        read_bytes(self, "shard_size")

    @property
    def shard_bytes(self) -> int | None:
        """`shard_size` as a number, which it is once checked."""
        return cast("int | None", self.shard_size)
