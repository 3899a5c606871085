"""`python -m esm_packed`, the same as the command `esm-packed`."""

import sys

from esm_packed.runners.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
