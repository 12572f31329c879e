"""`python -m dtbert`: the command line."""

import sys

from dtbert.cli import main

sys.exit(main())
