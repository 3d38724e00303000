"""Descriptions of machines: what they mean, and the one line that says what is wrong with one."""

import pytest

import reap_driver as rd
from reap_driver.memory.given_machine import GivenMachine, parse_machine
from reap_driver.memory.host_memory import Free
from reap_driver.memory.machine import Machine, planned_machine
from reap_driver.memory.rates import given_rates
from reap_driver.workflow.errors import OptionError

GB = 10**9


@pytest.mark.parametrize(
    ("text", "machine"),
    [
        ("cpu", GivenMachine(0, "cpu")),
        ("H200-141GB", GivenMachine(1, "H200", 141 * GB)),
        (
            "8xA100-SXM4-80GiB, ram = 2TB ,disk=3.5GB/s,free=500GB,flops=200TFLOP/s,copy=20GB/s",
            GivenMachine(8, "A100-SXM4", 80 << 30, 2000 * GB, 3.5e9, 500 * GB, 200e12, 20e9),
        ),
        ("cpu,flops=1.5T,ram=64G", GivenMachine(0, "cpu", ram=64 * GB, flops=1.5e12)),
    ],
)
def test_descriptions(text: str, machine: GivenMachine) -> None:
    assert parse_machine(text) == machine


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is no device; give [Nx]NAME-SIZE or cpu, then key=value"),
        ("1xH200", "'1xH200' is no device; give [Nx]NAME-SIZE or cpu"),
        ("1xH200-big", "'1xH200-big' is no device"),
        ("ram=64GB", "'ram=64GB' is no device"),
        ("1xcpu-64GB", "'1xcpu-64GB' is no device"),
        ("0xH200-141GB", "'0xH200-141GB' has no GPU; give at least 1, or cpu"),
        ("cpu,rma=64GB", "'rma=64GB' is not key=value with a key that is known; did you mean ram="),
        ("cpu,x=1", "'x=1' is not key=value with a key that is known; there are ram, disk, free,"),
        ("cpu,64GB", "'64GB' is not key=value"),
        ("cpu,", "'' is not key=value"),
        ("cpu,ram=much", "ram=much: 'much' is not a size such as 128GB"),
        ("cpu,ram=0", "ram=0: '0' is not a size"),
        ("cpu,ram=128", "ram=128: '128' is not a size such as 128GB"),
        ("1xH200-141", "'1xH200-141' is no device"),
        ("cpu,flops=400", "flops=400: '400' is not operations per second such as 400T"),
        ("cpu,disk=2GB", "disk=2GB: '2GB' is not a rate such as 2GB/s"),
        ("cpu,flops=fast", "flops=fast: 'fast' is not operations per second such as 400T"),
        ("cpu,ram=1GB,ram=2GB", "ram is given twice; give it once"),
        ("cpu,copy=1GB/s", "'copy=1GB/s': a machine without a GPU copies to none; leave it out"),
    ],
)
def test_what_is_none(text: str, says: str) -> None:
    with pytest.raises(OptionError) as caught:
        rd.EstimateOptions(model="M", tokens=1, machine=text)
    assert str(caught.value).startswith(f"`machine={text}`: {says}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("machine", "run", "says"),
    [
        ("cpu", {"device": "cuda"}, "`device=cuda`: `machine=cpu` computes on cpu; leave"),
        ("H200-141GB", {"device": "cpu"}, "`device=cpu`: `machine=H200-141GB` computes on cuda"),
        ("H200-141GB", {"backend": "cuda"}, "`backend=cuda`: not together with `machine`"),
        ("H200-141GB", {"device_map": "auto"}, "`device_map=auto`: nothing is estimated of"),
        (None, {"device_map": "auto"}, "`device_map=auto`: nothing is estimated of"),
    ],
)
def test_options_that_contradict_it(machine: str | None, run: dict[str, str], says: str) -> None:
    with pytest.raises(OptionError) as caught:
        rd.EstimateOptions(model="M", tokens=1, machine=machine, run=rd.RunOptions(**run))
    assert str(caught.value).startswith(says)


def test_ranks_share_it() -> None:
    given = parse_machine("4xH200-141GB,ram=1TB")
    host = Free(250 * GB, "as `machine` says, a share of 4")
    device = Free(141 * GB, "as `machine` says")
    assert planned_machine(given) == Machine("H200", device, host, None, ranks=4)
    shared = planned_machine(parse_machine("4xH200-141GB,free=2TB"))
    assert shared.disk_free == Free(500 * GB, "as `machine` says, a share of 4")
    assert (shared.whole_disk, planned_machine(given).whole_disk) == (2000 * GB, None)
    alone = planned_machine(parse_machine("cpu,ram=64GB"))
    assert (alone.device_free, alone.ranks) == (alone.host_free, 1)


def test_rates_are_those_given() -> None:
    rates = given_rates(parse_machine("H200-141GB,disk=2GB/s"))
    assert rates.disk is not None
    assert rates.disk.per_second == 2e9
    assert (rates.copy, rates.matmul, set(rates.unknown)) == (None, None, {"copy", "matmul"})
    assert set(given_rates(parse_machine("cpu")).unknown) == {"disk", "matmul"}
