"""Finds out before any data is tokenized whether the chat template can render it.

Without this, a template that is missing or broken would end a run only when the first conversation
is reached, perhaps an hour after the sources before it were tokenized or downloaded.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from reap_driver.data.encode import Encoder
from reap_driver.data.hub import first_rows
from reap_driver.data.records import BadRecords
from reap_driver.data.sampling import all_records
from reap_driver.data.source import DataSource

_FIRST = 16  # records of each source that are looked at


def check_template(encoder: Encoder, sources: Sequence[DataSource], *, skip_bad: bool) -> None:
    """Checks the chat template on the kinds of conversations that the first records have.

    Records of data sets of the hub are only looked at, without downloading the data set, if there
    is some kind of conversation that the template cannot render.

    Args:
        encoder: has the template.
        sources: the sources to be read.
        skip_bad: bad records are skipped: only check that the template renders a question and an
            answer, and not what some records have besides.

    Raises:
        DataError: some source needs a chat template, and there is none, or it fails; names the
            record.
    """
    remote = []
    for source in sources:
        if not isinstance(source.location, Path):
            remote.append(source)
            continue
        for record in islice(all_records(source, BadRecords()), _FIRST):
            encoder.check_template(record, only_plain=skip_bad)
    if not remote or encoder.renders_all(remote[0].name):
        return
    for source in remote:
        assert not isinstance(source.location, Path)
        for record in first_rows(source.location, _FIRST):
            encoder.check_template(source.completed(record), only_plain=skip_bad)
