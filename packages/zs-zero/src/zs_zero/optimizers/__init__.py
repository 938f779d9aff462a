"""Optimizers that torch has not, or has not in this form: ordinary `torch.optim.Optimizer` classes, usable alone.

Each says by `__zs_requires__` what it must see of a parameter (see `zs_zero.requirements`), so all of them can be
sharded, at every stage.
"""

from .adam import Adam
from .lamb import Lamb
from .lion import Lion
from .muon import Muon, mark_for_muon

__all__ = ["Adam", "Lamb", "Lion", "Muon", "mark_for_muon"]
