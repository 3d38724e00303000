"""Options that several jobs share: what each does, its default and its unit, in one place.

An option that is one word on the command line is one word here: `--seq-len 512` is `seq_len=512`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from reap_driver.base.mtp import MtpChoice
from reap_driver.base.quantities import number, whole
from reap_driver.workflow.fields import option, options, refused

SEQ_LEN = 2048
DATA, RUN, JOURNAL = "data", "running the model", "journal"
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


def read_bytes(given: Any, *names: str) -> None:
    """Replaces the text of options that are numbers of bytes, such as "5GB", by the number."""
    for name in names:
        text = getattr(given, name)
        if isinstance(text, str):
            value = int(number(text, "B") or 0)  # 16.1GiB is no whole number
            _replace(given, name, value or None, "a size such as 5GB, 800MB or 4GiB")
    check_positive(given, *names)


def read_count(given: Any, name: str) -> None:
    """Replaces the text of an option that is a count, such as "24M", by the number."""
    text = getattr(given, name)
    if isinstance(text, str):
        _replace(given, name, whole(text), "a whole number such as 24M or 65536")
    check_positive(given, name)


def _replace(given: Any, name: str, value: int | None, expected: str) -> None:
    """Sets an option that was given as text; `value` is None where the text is none."""
    if value is None:
        raise refused(f"`{name}={getattr(given, name)}`: not {expected}")
    object.__setattr__(given, name, value)


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
        help="a .jsonl, .json, .parquet, .csv, .tsv or .txt file, compressed or not, a folder of "
        "them, or a data set of the hub, owner/name[subset](split); :N takes a random sample of N "
        "records, :2Mtok one of 2 million tokens; GROUP names the statistics (default: the file's "
        "name); several sources can be given",
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
        "with a field chat_template, such as another model's tokenizer_config.json",
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


def check_resume(resume: bool | str, out: Any, what: str) -> None:
    """Raises OptionError for a run that is to be resumed and writes nothing."""
    if resume and out is None:
        raise refused(f"`resume={resume}`: needs `out`, beside which the {what} is")


@options
@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How a checkpoint is written.

    Example:
        >>> rd.WriteOptions(shard_size="5GB").shard_bytes
        5000000000
    """

    mtp: MtpChoice = option(
        "drop",
        group=_WRITE,
        help="multi-token-prediction layers: leave them out, prune their experts (by their own "
        "scores where they can be observed, else by those of the last layer), or keep all their "
        "experts, where config.json can say so",
    )
    shard_size: int | str | None = option(
        None,
        metavar="SIZE",
        group=_WRITE,
        help="largest weight file, such as 5GB (default: as the source is divided)",
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
