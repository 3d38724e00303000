"""Unpacks codes of 2 to 8 bits from 32-bit words.

Code i of a column begins at bit i * bits, the lowest bits first. Codes of 3, 5, 6 and 7 bits do not
fill words: one may begin in a word and end in the next.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

WORD = 32  # bits


def words_of(codes: int, bits: int) -> int:
    """How many words a number of codes takes."""
    return -(-codes * bits // WORD)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The codes of every column.

    Args:
        words: [words_of(count, bits), columns], int32.
        bits: of a code, 2 to 8.
        count: codes per column.

    Returns:
        [count, columns], uint8.

    Example:
        >>> unpack(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 8).T.tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    shared = math.gcd(WORD, bits)
    each, length = WORD // shared, bits // shared  # codes and words of a block, which is whole
    blocks = -(-len(words) // length)
    words = pad(words, (0, 0, 0, blocks * length - len(words))).view(blocks, length, -1)
    codes = words.new_empty((blocks, each, words.shape[-1]), dtype=torch.uint8)
    mask = (1 << bits) - 1
    for number in range(each):
        word, shift = divmod(number * bits, WORD)
        found = words[:, word] >> shift  # copies the sign into the upper bits
        left = WORD - shift
        if left < bits:
            found = found & ((1 << left) - 1) | words[:, word + 1] << left
        codes[:, number] = found & mask
    return codes.flatten(0, 1)[:count]


def reorder(codes: Tensor, order: Sequence[int]) -> Tensor:
    """Rows of codes put where they belong: of every len(order) rows, row i to place order[i].

    Args:
        codes: [rows, columns], a multiple of len(order) rows.
        order: a permutation.
    """
    places = sorted(range(len(order)), key=order.__getitem__)
    return codes.unflatten(0, (-1, len(order)))[:, places].flatten(0, 1)


def plus_one(words: Tensor, bits: int) -> Tensor:
    """Words with one added to each code as if to one number, so that a code may carry into the
    next. For 2, 4 and 8 bits.

    Args:
        words: of any shape, int32; a sum of more than 32 bits loses the highest.
        bits: of a code.
    """
    return words + sum(1 << place for place in range(0, WORD, bits))
