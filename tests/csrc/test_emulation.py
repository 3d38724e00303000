"""Whether the emulation that runs our CUDA kernels on the CPU shows what is wrong with a kernel."""

from pathlib import Path

import pytest

from tests.csrc.programs import HERE, ORDERS, compile_cpp, run


@pytest.fixture(scope="module")
def program(emulation: list[Path]) -> Path:
    built = emulation[0].parent / "emulation_test"
    compile_cpp(built, "-O1", HERE / "emulation_test.cpp", *emulation)
    return built


@pytest.fixture(scope="module")
def hopper(emulation: list[Path]) -> Path:
    built = emulation[0].parent / "hopper_test"
    compile_cpp(built, "-O1", HERE / "hopper_test.cpp", *emulation)
    return built


def values(program: Path, kernel: str, seed: int) -> list[int]:
    done = run(program, kernel, seed)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("kernel", ["race", "missing_barrier"])
def test_races_depend_on_the_order(program: Path, kernel: str) -> None:
    assert len({tuple(values(program, kernel, seed)) for seed in range(8)}) > 1


def test_what_is_right_does_not(program: Path) -> None:
    """Row r of 8, over 32 lanes, lies in lanes 4 r to 4 r + 3 of each warp."""
    want = [32 * 1000 * (thread % 32 // 4) + sum(range(32)) for thread in range(64)]
    for seed in range(8):
        assert values(program, "right", seed) == want


def test_unwritten_shared_memory_is_all_ones(program: Path) -> None:
    assert values(program, "unwritten", 0) == [-1] * 64


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("lost_lanes", "threads wait for others that never come"),
        ("parted_lanes", "lanes of one warp have come to different places"),
        ("lost_threads", "threads wait for others that never come"),
    ],
)
def test_threads_that_miss_each_other_end_the_process(
    program: Path, kernel: str, message: str
) -> None:
    done = run(program, kernel)
    assert done.returncode < 0
    assert message in done.stderr


@pytest.mark.parametrize(("kernel", "status"), [("too_much_shared", 1), ("too_many_threads", 9)])
def test_what_cuda_would_refuse_is_refused(program: Path, kernel: str, status: int) -> None:
    assert run(program, kernel).returncode == status


@pytest.mark.parametrize("kernel", ["", "TMA alone"])
def test_words_of_hopper_compute_a_product(hopper: Path, kernel: str) -> None:
    for order in ORDERS:
        done = run(hopper, kernel, order)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kernel", ["no swizzle", "no fence of copies"])
def test_products_read_other_bytes(hopper: Path, kernel: str) -> None:
    assert [run(hopper, kernel, order).returncode for order in ORDERS] == [3] * len(ORDERS)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("more bytes", "threads 0-127: the mbarrier at byte 12288 to end phase 0, which lacks 0"),
        ("odd address", "a TMA load is not to a multiple of 128 bytes"),
        ("arrival before copies", "cp.async are not waited for"),
        ("no fence of products", "a product without products_begin"),
        ("lanes differ", "lanes of one warp issue different products"),
        ("a warp issues less", "warps of a group issue different products"),
        ("no commit", "products are not waited for"),
        ("no wait for products", "products are not waited for"),
        ("no initialization", "an mbarrier is used before barrier_init"),
        ("no fence of barriers", "TMA uses an mbarrier before barriers_ready"),
        ("barrier overwritten", "an mbarrier has been written over"),
        ("no wait for loads", "a block ends before copies that it began"),
        ("another arrival", "a block ends before copies that it began"),
        ("a thread stays away", "0-69, 71-127: bar.sync 1, to which 127 of 128 have come"),
        ("too little memory", "an mbarrier outside shared memory"),
    ],
)
def test_misuse_of_hopper_says_what_it_is(hopper: Path, kernel: str, message: str) -> None:
    assert message in run(hopper, kernel).stderr


def test_a_thread_that_only_waits_may_miss_a_phase(hopper: Path) -> None:
    """The emulation asks each thread at its own turn, as the GPU does."""
    runs = [run(hopper, "idle waiters", order) for order in ORDERS]
    assert runs[0].returncode == 0
    assert any("to end phase 1, which lacks 1 of 1 arrivals" in done.stderr for done in runs)
