"""`python -m fusionsam` is the command `fusionsam`."""

import sys

from fusionsam.cli import main

sys.exit(main())
