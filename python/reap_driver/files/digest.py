"""A digest of a checkpoint's weights, computed without reading all of them."""

import hashlib

from reap_driver.files.checkpoint import Checkpoint

_SAMPLE_BYTES = 64 << 10


def weights_digest(source: Checkpoint) -> str:
    """`sha256:...` over the tensors' names, dtypes and shapes and a sample of each file's data.

    The samples are the first and the last 64 KiB. They tell two trainings of one architecture
    apart, but do not reveal a single changed value.
    """
    digest = hashlib.sha256()
    for shard in source.shards:
        entries = list(shard.tensors.items())
        digest.update(repr([(key, e.dtype, e.shape) for key, e in entries]).encode())
        if not entries:
            continue
        start, stop = entries[0][1].start, entries[-1][1].stop
        with shard.path.open("rb", buffering=0) as file:
            for at in (start, max(start, stop - _SAMPLE_BYTES)):
                file.seek(at)
                digest.update(file.read(min(_SAMPLE_BYTES, stop - at)))
    return "sha256:" + digest.hexdigest()
