"""A table of all experts, one row each, as CSV: for spreadsheets, and for quantizers that are told
which tensors get how many bits.
"""

import csv
from pathlib import Path

from reap_driver.interchange.auto_round_bits import bits_of
from reap_driver.interchange.content import Source
from reap_driver.planning.scoring import score

WHAT = "table of the experts"
COLUMNS = ("layer", "expert", "new_expert", "score", "count", "share", "bits")


def write(path: Path, source: Source) -> list[str]:
    """Writes a row for each expert: layer, id, the id that the plan leaves it with (empty where it
    is removed), score, rows routed to it, their share of the layer's rows, and bits (empty without
    an average, and where it is removed).

    Args:
        path: of the table.
        source: with statistics and the criterion that scores; plan and average are optional.

    Returns:
        Nothing that needs to be known.

    Raises:
        PlanError, DataError: the experts cannot be scored, see `rd.score`; or the average is
            outside the bits that there are.
    """
    scores = score(source.statistics(), source.criterion)
    bits = {} if source.bits is None else bits_of(source)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for name, layer in source.statistics().layers.items():
            counts = layer.total().count[0].tolist()
            rows = max(1, sum(counts))
            new = {expert: number for number, expert in enumerate(source.kept(name))}
            for expert, count in enumerate(counts):
                left = bits.get(name, {}).get(expert, "")
                value = float(scores[name][expert])
                share = f"{count / rows:.6f}"
                table.writerow([name, expert, new.get(expert, ""), value, count, share, left])
    return []
