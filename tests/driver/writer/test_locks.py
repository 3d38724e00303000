"""Locks of temporary folders: who works in a folder holds its lock, and others leave it alone."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from reap_driver.files.exchange import lock_of
from reap_driver.files.locks import locked
from reap_driver.writer import staging


def test_only_one_holds_a_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "lock") as mine, locked(tmp_path / "lock") as other:
        assert (mine, other) == (True, False)
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()


def test_a_lock_that_a_clean_up_took_first_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run's clean-up takes the new file's lock for an instant, three times."""
    out, taken = tmp_path / "pruned", []

    @contextlib.contextmanager
    def raced(path: Path) -> Iterator[bool]:
        with contextlib.ExitStack() as stack:
            if len(taken) < 3:
                stack.enter_context(FileLock(path))
                taken.append(path)
            yield stack.enter_context(locked(path))

    monkeypatch.setattr(staging, "locked", raced)
    with staging.staged(out, needed=0) as folder:
        assert len(taken) == 3
        assert lock_of(folder, out) not in taken
        with locked(lock_of(folder, out)) as other:
            assert not other
        (folder / "config.json").write_text("{}")
        assert staging.clean_stale(out) == []
        assert (folder / "config.json").exists()


def test_where_no_file_can_be_made_the_folder_is_the_error(tmp_path: Path) -> None:
    """/proc says of every new name that it does not exist, as if a lock had been removed."""
    with pytest.raises(FileNotFoundError), staging._make_folder(Path("/proc/pruned")):
        pytest.fail("a folder was made")
