"""`python -m debiaskd.cli`."""

import sys

from debiaskd.cli.entry import main

sys.exit(main())
