"""What readers of files have in common: where an input is written, how data are read."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

from tests.fuzz.campaign import Nonsense
from tests.fuzz.world import World


def in_file(path: Path, use: Callable[[Path], None]) -> Callable[[bytes], None]:
    """Writes each input to `path` and hands that on."""

    def read(content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        use(path)

    return read


def unsealed(read: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """Reads as if every digest fitted, so that what it guards is checked for itself."""

    def unsealed(content: bytes) -> None:
        with mock.patch("reap_kernels.documents._digest", lambda head, _: head.get("digest", "")):
            read(content)

    return unsealed


def encoded(world: World, model: Path, data: Path, *more: object, vocab: int = 259) -> None:
    """Reads and tokenizes data as `observe` does; no model runs."""
    from reap_driver.compat.model_config import load_config
    from reap_driver.data.encode import Encoder
    from reap_driver.data.packing import pack
    from reap_driver.data.source import DataSource

    source = DataSource.parse(str(data))
    encoder = Encoder(model, load_config(model))
    packed = pack(source, encoder, seq_len=64)
    packed.provenance()
    if len(packed.ids) and not 0 <= int(packed.ids.min()) <= int(packed.ids.max()) < vocab:
        raise Nonsense("a token id is outside the vocabulary")
