"""`python -m emorl` is the `emorl` command."""

import sys

from emorl.cli import main

sys.exit(main())
