"""`python -m flexvar` is the command `flexvar`."""

import sys

from flexvar.cli import main

sys.exit(main())
