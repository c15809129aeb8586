"""`python -m splitserve.cli` is `splitserve`."""

import sys

from splitserve.cli import main

sys.exit(main())
