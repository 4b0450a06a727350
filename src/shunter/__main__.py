"""`python -m shunter`, and so `torchrun -m shunter`, is the command line."""

import sys

from .cli import main

sys.exit(main())
