"""Registers that warps of a kernel use after they have given some up, and those it uses at all.

A warp that gives registers up (setmaxnreg) and uses one it no longer has reads what another warp
keeps there; the compiler's report has one number for the whole kernel and does not show it.
"""

import re
from collections.abc import Iterator

# An instruction as cuobjdump prints it: its offset within the function, and its words.
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;")
_TARGET = re.compile(r"(?:@!?U?P\w+\s+)?(?:BRA|BSSY|CALL|WARPSYNC)\b.*?\b0x([0-9a-f]+)$")
_REGISTER = re.compile(r"\bR(\d+)\b")
# Instructions after which the next is not run, unless a predicate skips them.
_ENDS = re.compile(r"(?:BRA(?:\.\w+)* (?:`|0x)|EXIT\b|RET\b)")
_TABLE = re.compile(r"(?:@!?U?P\w+\s+)?(?:BRXU?|JMXU?|JMP)\b")
_GIVES = "USETMAXREG.DEALLOC"


def registers(code: str) -> int:
    """One more than the highest register that any instruction of a kernel names.

    Of a vector, instructions name the first register alone. One of up to four begins at a multiple
    of its size and so passes no limit of setmaxnreg, all of which are multiples of eight; of the
    longer ones of HGMMA, other instructions name each register.
    """
    return 1 + max(map(int, _REGISTER.findall(code)), default=-1)


def registers_after_giving(code: str) -> int:
    """Likewise, of the instructions that can be reached after a warp group has given registers up.

    Args:
        code: disassembly of one kernel, as cuobjdump prints it.

    Raises:
        ValueError: no warp group gives registers up, or the targets of a jump there are unknown.
    """
    instructions = [(int(at, 16), words) for at, words in _INSTRUCTION.findall(code)]
    place = {at: index for index, (at, _) in enumerate(instructions)}
    left = [i + 1 for i, (_, words) in enumerate(instructions) if _GIVES in words]
    if not left:
        raise ValueError(f"no {_GIVES} in the kernel")
    reached: set[int] = set()
    while left:
        index = left.pop()
        if index in reached or index >= len(instructions):
            continue
        reached.add(index)
        left += list(_next(index, instructions[index][1], place))
    return registers("\n".join(instructions[index][1] for index in reached))


def _next(index: int, words: str, place: dict[int, int]) -> Iterator[int]:
    """Where a thread may go from an instruction."""
    if _TABLE.match(words):
        raise ValueError(f"a jump whose targets are in a table: {words}")
    target = _TARGET.match(words)
    if target and int(target[1], 16) in place:
        yield place[int(target[1], 16)]
    if not _ENDS.match(words):
        yield index + 1
