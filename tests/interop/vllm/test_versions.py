"""The vLLM of this environment is one that the plugin says it was tested with."""

import pytest

from reap_driver.integrations.vllm.engine import versions


def test_this_version_is_tested_and_has_all_that_is_hooked() -> None:
    assert versions.version() in versions.TESTED
    assert versions.note() is None
    versions.check(versions.ENGINE)
    versions.check(versions.SERVER)


@pytest.mark.parametrize("seam", [*versions.ENGINE, *versions.SERVER], ids=lambda seam: seam.path)
def test_what_is_needed_of_a_seam_is_looked_for(seam: versions.Seam) -> None:
    changed = versions.Seam(seam.module, seam.path, (*seam.needs, "no_such_thing"))
    if seam.path.startswith("torch."):
        changed = versions.Seam(seam.module, f"{seam.path}_gone")
    found = versions.missing(changed)
    assert found is not None
    assert seam.path in found
