"""Whether the emulation that runs our CUDA kernels on the CPU shows what is wrong with a kernel."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "tests need a C++ compiler; install g++"
    built = tmp_path_factory.mktemp("emulation") / "emulation_test"
    sources = [HERE / "emulation_test.cpp", CSRC / "host/emulation.cpp"]
    command = [compiler, "-std=c++20", "-O1", "-w", f"-I{CSRC}", *sources, "-o", built]
    subprocess.run(list(map(str, command)), check=True)
    return built


def run(program: Path, kernel: str, seed: int = 0) -> subprocess.CompletedProcess[str]:
    command = [str(program), kernel, str(seed)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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
