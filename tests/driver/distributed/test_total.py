"""`Ranks.total`: every rank gets the sum of all, in the order of ranks, with the same bits."""

import torch

from reap_driver.observation.data_parallel import ranks
from tests.driver.distributed.launch import ranked

SHAPES = ((3, 5), (), (0, 4))


def values(rank: int) -> list[torch.Tensor]:
    """What a rank has."""
    generator = torch.Generator().manual_seed(rank)
    floats = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [*floats, torch.arange(4) + rank, torch.randn(6, 2, generator=generator).T]


def test_every_rank_gets_the_sum() -> None:
    def rank() -> int:
        with ranks() as world:
            own = values(world.rank)
            world.total(own)
            want = [torch.stack(each).sum(0) for each in zip(values(0), values(1), strict=True)]
            same = [torch.equal(a, b) for a, b in zip(own, want, strict=True)]
            print(f"rank {world.rank}: {same}")
        return 0

    ended = ranked(2, rank)
    assert ended.code == 0, ended.err
    for number in range(2):
        assert f"rank {number}: {[True] * 5}" in ended.out


def test_one_process_keeps_its_own() -> None:
    own = values(3)
    with ranks() as world:
        world.total(own)
    assert all(torch.equal(a, b) for a, b in zip(own, values(3), strict=True))
