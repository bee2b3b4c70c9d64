"""`python -m fusionsam` is the command `fusionsam`."""

import sys

from fusionsam.cli.main import main

sys.exit(main())
