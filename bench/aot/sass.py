"""Facts of machine code that decide a product's speed: what its main loop waits for and issues.

The main loop is the innermost one with a tensor-core instruction: the instructions from the target
of a conditional backward branch to the branch. A step passes through all of them but what a
conditional branch jumps over and no tensor-core instruction is in: in a persistent kernel whose
loops are flattened into one, that is a tile's beginning and its epilogue. What the compiler moved
elsewhere (a cold block behind the kernel's end) is not seen.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# An instruction as cuobjdump prints it: its offset within the function, and its words.
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;")
_At = tuple[int, str]
_FUNCTION = re.compile(r"^\s*Function : ", re.MULTILINE)
_BRANCH = re.compile(r"(?:@!?U?P\w+\s+)?BRA\b.*?\b0x([0-9a-f]+)$")

_DRAIN = re.compile(r"\bWARPGROUP\.DEPBAR\S* gsb0, 0x0\b")
_BARRIER = re.compile(r"\bBAR\.SYNC\b")
_COPY = re.compile(r"\bLDGSTS\b")
_BULK = re.compile(r"\bUTMALDG\b")
_WARPGROUP = re.compile(r"\bHGMMA\.64x(\d+)x(\d+)\b")


@dataclass(frozen=True)
class Loop:
    """What one step of the main loop of a product issues, by one thread.

    Attributes:
        drains: waits until no warp-group product is in flight (WARPGROUP.DEPBAR of 0): tensor cores
            then idle until the next is issued.
        barriers: waits of the whole block (BAR.SYNC).
        copies: asynchronous copies of a thread (LDGSTS).
        bulk: copies by the tensor memory accelerator (UTMALDG).
        products: (N, K) of every warp-group product of 64 rows (HGMMA), in order.
        length: number of instructions.
    """

    drains: int
    barriers: int
    copies: int
    bulk: int
    products: tuple[tuple[int, int], ...]
    length: int

    @property
    def shapes(self) -> str:
        """Distinct shapes of warp-group products, such as `64x256x16`."""
        return " ".join(f"64x{n}x{k}" for n, k in sorted(set(self.products)))

    def steps(self, elements: int, warps: int) -> int:
        """How often a block multiplies `elements` = BLOCK_M * columns * BLOCK_K in it: more than
        once where the compiler unrolled the loop. 1 without warp-group products.
        """
        done = sum(64 * n * k for n, k in self.products) * (warps // 4)
        return max(1, round(done / elements))


def main_loop(code: str, tensor_cores: str) -> Loop | None:
    """The main loop of disassembled code; None if no loop has a tensor-core instruction."""
    wanted = re.compile(tensor_cores)
    found = [
        loop
        for function in _functions(code)
        for loop in _loops(function)
        if any(wanted.search(words) for _, words in loop)
    ]
    if not found:
        return None
    body = _step(min(found, key=len), wanted)

    def count(pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.search(words)) for words in body)

    products = tuple(
        (int(shape[1]), int(shape[2])) for words in body if (shape := _WARPGROUP.search(words))
    )
    return Loop(count(_DRAIN), count(_BARRIER), count(_COPY), count(_BULK), products, len(body))


def _functions(code: str) -> Iterator[list[_At]]:
    """(offset, words) of every instruction, function by function: offsets begin anew in each."""
    for part in _FUNCTION.split(code):
        yield [(int(at, 16), words) for at, words in _INSTRUCTION.findall(part)]


def _loops(instructions: list[_At]) -> Iterator[list[_At]]:
    """The instructions of every loop: from the target of a conditional backward branch to it."""
    for at, words in instructions:
        branch = _BRANCH.match(words)
        # A block behind the kernel's end comes back by a branch without a condition.
        if branch and words.startswith("@") and (target := int(branch[1], 16)) < at:
            yield [one for one in instructions if target <= one[0] <= at]


def _step(loop: list[_At], wanted: re.Pattern[str]) -> list[str]:
    """The words of a loop without what conditional branches jump over, but for products."""
    kept = loop
    for at, words in loop:
        branch = _BRANCH.match(words)
        if branch and words.startswith("@") and at < int(branch[1], 16) <= loop[-1][0]:
            over = [one for one in loop if at < one[0] < int(branch[1], 16)]
            if not any(wanted.search(inside) for _, inside in over):
                kept = [one for one in kept if one not in over]
    return [words for _, words in kept]
