"""Lets the tests of this folder share their helpers; they insert the folder themselves too, for the ranks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
