"""`python -m reap_driver` is `reap-kernels`."""

import sys

from reap_driver.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
