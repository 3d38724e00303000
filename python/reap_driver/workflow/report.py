"""Reporting: statistics and a plan as one HTML page and pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.reporting.comparison import read_comparison
from reap_driver.reporting.page import FILES, write_report
from reap_driver.workflow.comparison_results import Compared, Comparisons
from reap_driver.workflow.follow_up_jobs import ReportOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.outputs import check_folder, inputs_of
from reap_driver.workflow.plan import plan_of, stats_of
from reap_driver.workflow.results import Result


@dataclass(frozen=True, repr=False)
class Reported(Result):
    """A report that was written.

    Attributes:
        out: its folder.
        files: the page, then the pictures.

    Example:
        >>> rd.report(stats, out="pictures").files[0].name
        'report.html'
    """

    out: Path
    files: list[Path]

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        return {"out": str(self.out), "files": [str(path) for path in self.files]}

    def describe(self) -> str:
        """See `Result`."""
        return f"wrote {self.files[0]} and {len(self.files) - 1} pictures beside it"


def report(options: ReportOptions, listener: Listener | None = None) -> Reported:
    """Draws and writes; see `reap_driver.report`."""
    heard, out = Collector(listener), options.out
    assert isinstance(out, Path)  # as options that were checked have it
    check_folder(out, FILES, overwrite=options.overwrite, inputs=inputs_of(options, out))
    stats = stats_of(options.stats)
    plan = None if options.plan is None else plan_of(options.plan)
    compared = options.compare
    if isinstance(compared, Compared | Comparisons):
        compared = compared.facts()
    elif compared is not None:
        compared = read_comparison(Path(compared))
    out.mkdir(exist_ok=True)
    written = write_report(stats, out, plan, criterion=options.criterion, comparison=compared)
    found = Reported(heard.notes, out, list(written))
    heard.say(found.describe())
    return found
