"""`python -m dcvit` is `dcvit`."""

import sys

from dcvit.cli import main

sys.exit(main())
