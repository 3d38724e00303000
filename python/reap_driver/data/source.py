"""Parses data sources: `--data [group=]SOURCE[:BUDGET]`.

SOURCE is a file (JSON, Parquet, CSV or text, compressed or not), a folder of such files, or a data
set of the Hugging Face hub, `owner/name[subset](split)@revision`, of which only the name is
required. BUDGET draws a random sample of the records with the seed: `:700` draws 700 records,
`:2Mtok` records with 2 million tokens in total. The group is the name under which statistics are
kept; the default is the name of the file, folder or data set, without owner and suffix.

If a file or folder has exactly the given name, it is used: so `a=b.jsonl` and `part:7` can be read,
and a folder `owner/name` takes precedence over the data set of that name.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from reap_driver.compat.library_errors import one_line
from reap_driver.data.compressed_files import COMPRESSIONS
from reap_driver.data.records import Record
from reap_kernels.errors import DataError
from reap_kernels.files import exists
from reap_kernels.schema import short

SPLIT = "train"
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_LONGEST_NAME, _LONGEST = 96, 500  # characters: of a name on the hub, and of the whole SOURCE
_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_HUB = re.compile(
    rf"(?P<name>{_NAME}(?:/{_NAME})?)"
    r"(?:\[(?P<subset>[^\[\]]+)\])?(?:\((?P<split>[^()]+)\))?(?:@(?P<revision>[\w./-]+))?",
    re.ASCII,
)
_FORM = (
    "give [GROUP=]SOURCE[:N] or [GROUP=]SOURCE[:Ntok], where SOURCE is a .jsonl, .json, .parquet, "
    ".csv, .tsv or .txt file, a folder of such files, or a hub data set such as "
    "owner/name[subset](split)"
)


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub: `name[subset](split)@revision`.

    Attributes:
        name: `owner/name`, or `name` for the few data sets without an owner.
        subset: its configuration; None for the default.
        split: anything that `datasets.load_dataset` takes, such as `train[:10%]`; None for `train`.
        revision: commit, tag or branch; None for the newest commit.
        files: read only these files, such as `en/c4-train.00000-of-01024.json.gz`; set by recipes.
    """

    name: str
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    files: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "HubDataset | None":
        """The data set that `text` names; None if it does not have the form of a data set."""
        found = _HUB.fullmatch(text)
        if found is None or len(found["name"]) > _LONGEST_NAME or len(text) > _LONGEST:
            return None
        return cls(found["name"], found["subset"], found["split"], found["revision"])

    def __str__(self) -> str:
        subset = "" if self.subset is None else f"[{self.subset}]"
        split = "" if self.split is None else f"({self.split})"
        revision = "" if self.revision is None else f"@{self.revision}"
        files = f"{{{','.join(self.files)}}}" if self.files else ""
        return f"{self.name}{subset}{split}{revision}{files}"


@dataclass(frozen=True)
class DataSource:
    """One `--data` argument or entry of a recipe.

    Attributes:
        location: file, folder or data set.
        group: name under which its statistics are kept.
        samples: number of records to draw; None for no limit.
        tokens: number of tokens to draw records for; None for no limit.
        tools: JSON text of a list of tools, for records that have none; set by recipes.
        recipe: name and digest of the recipe that lists it; None if none does.
    """

    location: Path | HubDataset
    group: str
    samples: int | None = None
    tokens: int | None = None
    tools: str | None = None
    recipe: tuple[str, str] | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The location as text, for messages and provenance; bytes that are not text are
        escaped.
        """
        return _escaped(str(self.location))

    def completed(self, record: Record) -> Record:
        """The record, with the source's tools if it has none."""
        if self.tools is not None and not record.fields.get("tools"):
            record.fields["tools"] = self.tools
        return record

    @classmethod
    def parse(cls, text: str) -> "DataSource":
        """Parses `[group=]SOURCE[:BUDGET]`.

        Raises:
            DataError: SOURCE is neither an existing file or folder nor the name of a hub data set,
                or the budget is invalid.
        """
        if not text.strip():
            raise DataError(f"data {short(text)}: is empty; {_FORM}")
        if exists(text):
            return cls(_readable(Path(text), f"data '{one_line(text)}'"), default_group(Path(text)))
        named = re.fullmatch(r"([^=/\\\[\](]+)=(.+)", text)
        group, rest = (named[1], named[2]) if named else (None, text)
        samples = tokens = None
        if not exists(rest):
            budget = re.fullmatch(r"(.+):(\d[\w.]*)", rest)
            if budget:
                rest, (samples, tokens) = budget[1], _budget(text, budget[2])
        location = locate(rest, Path(), f"data '{one_line(text)}'")
        return cls(location, group or default_group(location), samples, tokens)


def locate(text: str, folder: Path, what: str) -> Path | HubDataset:
    """The file or folder of this name; if there is none, the hub data set of this name.

    Args:
        text: SOURCE.
        folder: folder of relative paths.
        what: beginning of error messages.

    Raises:
        DataError: there is no such file or folder, and the text is not the name of a data set.
    """
    try:
        path = folder / Path(text).expanduser()
    except (RuntimeError, ValueError) as error:  # there is no such user
        raise DataError(
            f"{what}: no folder '{one_line(text)}' ({one_line(str(error))}); {_FORM}"
        ) from error
    if exists(path):
        return _readable(path, what)
    hub = HubDataset.parse(text)
    if hub is None or _looks_like_a_file(hub.name):
        raise DataError(f"{what}: no file or folder '{one_line(str(path))}'; {_FORM}")
    return hub


def _readable(path: Path, what: str) -> Path:
    """The path. Raises DataError unless it is a file or folder: a pipe cannot be read twice
    and may never end.
    """
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{what}: is neither file nor folder; write what comes from it to a file")
    return path


def default_group(location: Path | HubDataset) -> str:
    """`code` for data/code.jsonl.gz, the folder data/code and the data set owner/code."""
    if isinstance(location, HubDataset):
        return location.subset or location.name.rpartition("/")[2]
    path = location.resolve()
    return _escaped((path.with_suffix("") if path.suffix in COMPRESSIONS else path).stem)


def _escaped(name: str) -> str:
    """The name with surrogates escaped, which stand for bytes that are not text and cannot
    be encoded.
    """
    return name.encode("utf-8", "backslashreplace").decode()


def token_count(text: str) -> int | None:
    """The number of tokens in `2Mtok`, `500ktok`, `1.5Mtok` or `4096tok`; None for anything
    else.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)([kmg]?)tok", text, re.IGNORECASE)
    return None if found is None else round(float(found[1]) * _SUFFIXES[found[2].lower()])


def _budget(text: str, written: str) -> tuple[int | None, int | None]:
    """(number of records, number of tokens), one of which is None."""
    samples = int(written) if re.fullmatch(r"[0-9]{1,18}", written) else None
    tokens = token_count(written) if samples is None else None
    if samples is None and tokens is None:
        raise DataError(
            f"data '{one_line(text)}': {short(written)} is not a budget; give a number of records, "
            "such as 700, or of tokens, such as 2Mtok"
        )
    if 0 in (samples, tokens):
        raise DataError(
            f"data '{one_line(text)}': takes 0 records; give a number above 0 after the last ':'"
        )
    return samples, tokens


def _looks_like_a_file(name: str) -> bool:
    endings = (".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".csv", ".tsv", *COMPRESSIONS)
    return name.endswith(endings)
