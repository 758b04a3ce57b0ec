"""`python -m revit_kernels.cli` is `revit`: for torchrun, which starts modules."""

import sys

from revit_kernels.cli import main

sys.exit(main())
