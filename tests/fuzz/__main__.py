"""`python -m tests.fuzz`: many changed inputs for every reader, and the table of their outcomes."""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that only the hub could have is refused at once

from tests.fuzz.campaign import again, run, table
from tests.fuzz.readers import readers
from tests.fuzz.world import World

_MEMORY = 12 * 2**30  # what asks for more than that ends in a MemoryError, which is a fault


def main() -> int:
    """Returns 1 where a reader ended in a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=50_000, help="how many (default 50000)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal inputs")
    parser.add_argument("--only", action="append", default=[], help="a reader; may be repeated")
    parser.add_argument("--again", metavar="READER:SEED:NUMBER", help="one input, with traceback")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        every = readers(World(Path(folder)))
        if args.again:
            again(every, args.again)
            return 0
        unknown = set(args.only) - {reader.name for reader in every}
        if unknown:
            parser.error(f"no reader {', '.join(sorted(unknown))}")
        chosen = [reader for reader in every if not args.only or reader.name in args.only]
        began = time.monotonic()
        found = run(chosen, args.inputs, args.seed)
    print(table(found))
    print(f"{time.monotonic() - began:.0f} s, seed {args.seed}")
    return int(any(one.wrong for one in found.values()))


sys.exit(main())
