"""torch.nn.functional as it was when upcast was imported.

A program may replace a function there. What the program calls is the program's; what a handler of ours computes with is
torch's, or the replacement would run twice.
"""

from types import SimpleNamespace
from typing import Any

import torch.nn.functional

F: Any = SimpleNamespace(**vars(torch.nn.functional))
