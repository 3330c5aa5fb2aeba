"""``python -m upcast``."""

import sys

from upcast.cli.main import main

sys.exit(main())
