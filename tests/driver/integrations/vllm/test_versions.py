"""What is said about versions of vLLM, without vLLM: its modules are made up."""

import sys
from types import ModuleType

import pytest

from reap_driver.integrations.vllm import plugin
from reap_driver.integrations.vllm.engine import versions
from reap_driver.integrations.vllm.engine.versions import Seam
from reap_kernels.errors import BackendUnavailable


def of(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `import vllm` find this version, which has nothing else."""
    vllm = ModuleType("vllm")
    vllm.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)


@pytest.mark.parametrize(
    ("seam", "lacks"),
    [
        (Seam("textwrap", "wrap", ("text", "width")), None),
        (Seam("textwrap", "wrap", ("text", "hue")), "hue of textwrap.wrap"),
        (Seam("textwrap", "TextWrapper", ("width", "fill")), None),
        (Seam("textwrap", "TextWrapper", ("tabsize", "hue")), "hue of textwrap.TextWrapper"),
        (Seam("textwrap", "TextWrapper.unfill"), "textwrap.TextWrapper.unfill"),
        (Seam("dataclasses", "Field"), None),
        (Seam("no_such_module", "any"), "no_such_module (No module named 'no_such_module')"),
        (Seam("torch", "torch.ops.aten.relu"), None),
        (Seam("torch", "torch.ops.aten.no_such_operator"), "torch.torch.ops.aten.no_such_operator"),
        (Seam(versions.__name__, "Seam", ("module", "needs")), None),
    ],
)
def test_a_seam_is_looked_for_by_what_it_is(seam: Seam, lacks: str | None) -> None:
    assert versions.missing(seam) == lacks


def test_a_version_that_lacks_something_is_refused_with_one_that_works(monkeypatch) -> None:
    of("0.99.1+cpu", monkeypatch)
    seams = (Seam("textwrap", "wrap", ("hue",)), Seam("textwrap", "unwrap"), Seam("os", "getpid"))
    with pytest.raises(BackendUnavailable) as refused:
        versions.check(seams)
    message = str(refused.value)
    assert "does not fit vLLM 0.99.1, which lacks hue of textwrap.wrap; textwrap.unwrap" in message
    assert f"vLLM {', '.join(versions.TESTED)}" in message
    assert "VLLM_PLUGINS" in message
    versions.check(seams[2:])


def test_a_version_that_was_not_tested_is_said(monkeypatch) -> None:
    of(f"{versions.TESTED[-1]}+cpu", monkeypatch)
    assert versions.note() is None
    of("0.99.1.dev3+g123", monkeypatch)
    assert "was not tested with vLLM 0.99.1.dev3" in str(versions.note())


def test_without_vllm_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(BackendUnavailable, match=r"pip install reap-kernels\[vllm\]"):
        versions.version()


def test_vllm_does_not_start_with_the_plugin_where_it_does_not_fit(monkeypatch) -> None:
    of("0.99.1", monkeypatch)
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    plugin.register()
    monkeypatch.setenv("VLLM_PLUGINS", "another,reap")
    with pytest.raises(BackendUnavailable, match=r"does not fit vLLM 0\.99\.1, which lacks vllm\."):
        plugin.register()
