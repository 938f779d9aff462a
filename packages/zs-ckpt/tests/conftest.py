"""Lets the tests of this folder share their helpers; they insert the folder themselves too, for the ranks."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # its threads do not survive a fork, and these tests fork
