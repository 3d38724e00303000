"""Bits by expert for AutoRound (0.16, `layer_config`): an object {part of a layer's name: options},
by names of the pruned checkpoint where there is a plan.
"""

from pathlib import Path

from reap_driver.interchange.content import Source
from reap_driver.interchange.json_files import write_json
from reap_driver.planning.expert_bits import CRITERION, expert_bits
from reap_driver.planning.scoring import score

WHAT = "layer_config of AutoRound"


def write(path: Path, source: Source) -> list[str]:
    """Writes the bits of every expert that is left.

    Args:
        path: of the file.
        source: with statistics and the average of the bits; where there is a plan, only what it
            keeps gets bits, by its new ids.

    Returns:
        How many experts get which bits.

    Raises:
        PlanError, DataError: see `bits_of`.
    """
    found = bits_of(source)
    # With the dot behind it, AutoRound does not take expert 1 for a part of expert 10.
    content = {
        f"{name}.{number}.": {"bits": bits}
        for name, of_layer in found.items()
        for number, bits in enumerate(of_layer.values())
    }
    write_json(path, content)
    every = [bits for of_layer in found.values() for bits in of_layer.values()]
    counts = ", ".join(f"{every.count(bits)} with {bits}" for bits in sorted(set(every)))
    return [f"{len(every)} experts: {counts} bits, {sum(every) / len(every):.2f} on average"]


def bits_of(source: Source) -> dict[str, dict[int, int]]:
    """{layer: {id of an expert in the original: its bits}} of all that are left.

    Raises:
        PlanError: the average is outside the bits that there are.
        DataError: the statistics cannot be scored, see `rd.score`.
    """
    assert source.bits is not None  # the table says that the format needs it
    scores = score(source.statistics(), CRITERION)
    kept = {name: source.kept(name) for name in scores if name in source.model.layers}
    left = {name: [float(scores[name][expert]) for expert in ids] for name, ids in kept.items()}
    bits = expert_bits(left, source.bits)
    return {name: dict(zip(ids, bits[name], strict=True)) for name, ids in kept.items()}
