"""Lets the tests of this folder share `zoo`; they insert the folder themselves too, for the ranks that import them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
