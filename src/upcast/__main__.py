"""``python -m upcast``."""

import sys

from upcast.cli import main

sys.exit(main())
