"""``python -m bncpu`` is the command bncpu."""

import sys

from bncpu.cli import main

sys.exit(main())
