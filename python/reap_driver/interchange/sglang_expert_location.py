"""Expert locations for SGLang (`--init-expert-location`, sglang/srt/eplb/expert_location.py):
`logical_count`, from which the server itself places the experts, and copies of those with most
rows. It has a row for every decoder layer; layers without experts have zeros.
"""

from pathlib import Path

from reap_driver.interchange.content import Source, uniform_count
from reap_driver.interchange.json_files import write_json

WHAT = "expert location file"


def write(path: Path, source: Source) -> list[str]:
    """Writes how many rows each expert was routed.

    Args:
        path: of the file; the server knows the format by its name, which ends in `.json`.
        source: with statistics and the number of decoder layers; where there is a plan, the file is
            of the pruned checkpoint, which numbers the kept experts anew.

    Returns:
        What to know of it.

    Raises:
        PlanError: layers are left with different numbers of experts.
    """
    if source.plan is not None:
        source.experts_plan(WHAT)
    model, experts, stats = source.model, uniform_count(source, WHAT), source.all_statistics(WHAT)
    assert model.decoder_layers is not None  # the table says that the format needs it
    rows = [[0] * experts for _ in range(model.decoder_layers)]
    for number, name in model.numbers().items():
        counts = stats.layers[name].total().count[0].tolist()
        rows[number] = [counts[expert] for expert in source.kept(name)]
    write_json(path, {"logical_count": rows})
    return []
