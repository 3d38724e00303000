"""`python -m bench.gpu`; worker processes import this file without running it."""

import sys

from bench.gpu import main

if __name__ == "__main__":
    main(sys.argv[1:])
