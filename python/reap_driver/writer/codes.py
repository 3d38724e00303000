"""Selects codes of a few bits that are packed into 32-bit words, and packs them again unchanged.

Works on single bits, because a code may begin in one word and end in the next (3-bit codes do).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reap_driver.writer.actions import SelectCodes

WORD_BITS = 32


def words_of(codes: int, bits: int) -> int:
    """How many 32-bit words a number of codes takes."""
    return -(-codes * bits // WORD_BITS)


def select_codes(
    words: npt.NDArray[np.uint32], bits: int, positions: Sequence[int]
) -> npt.NDArray[np.uint32]:
    """Keep the codes at these positions.

    Args:
        words: [slabs, words, columns], packed along the middle dimension, first code lowest.
        bits: of a code.
        positions: of the codes to keep, in their new order.

    Returns:
        [slabs, `words_of(len(positions), bits)`, columns]; bits behind the last code are zero.

    Example:
        >>> words = np.array([[[0x76543210]]], np.uint32)
        >>> hex(select_codes(words, 4, [1, 7, 6])[0, 0, 0])
        '0x671'
    """
    slabs, length, columns = words.shape
    lined = np.ascontiguousarray(words.transpose(0, 2, 1).astype("<u4", copy=False))
    stream = np.unpackbits(lined.view(np.uint8), axis=-1, bitorder="little")
    count = length * WORD_BITS // bits
    codes = stream[..., : count * bits].reshape(slabs, columns, count, bits)
    kept = codes[:, :, np.asarray(positions)].reshape(slabs, columns, -1)
    padding = words_of(len(positions), bits) * WORD_BITS - kept.shape[-1]
    kept = np.pad(kept, ((0, 0), (0, 0), (0, padding)))
    packed = np.packbits(kept, axis=-1, bitorder="little").view("<u4")
    return np.ascontiguousarray(packed.transpose(0, 2, 1))


def slab_bytes(action: SelectCodes, length: int, columns: int) -> int:
    """Bytes that one slab [length, columns] of words takes while its codes are selected."""
    return WORD_BITS * max(length, words_of(len(action.positions), action.bits)) * columns
