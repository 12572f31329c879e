"""`python -m dtbert.cli`, and so `torchrun -m dtbert.cli`."""

import sys

from dtbert.cli import main

sys.exit(main())
