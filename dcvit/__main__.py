"""`python -m dcvit` is `dcvit`."""

import sys

from dcvit.cli import main

if __name__ == "__main__":
    sys.exit(main())
