"""Which modules become units."""

import pytest
import torch
from torch import nn
from zs_comm import ConfigError
from zs_zero.units import choose_units


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Transformer(nn.Module):
    def __init__(self, tie=False):
        super().__init__()
        self.tok, self.pos = nn.Embedding(200, 16), nn.Embedding(8, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 200, bias=False)
        if tie:
            self.head.weight = self.tok.weight


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Transformer()
        self.scale = nn.Parameter(torch.ones(3))


def names(model, choice=None):
    return [unit.name for unit in choose_units(model, choice)]


def test_blocks_are_units_and_small_leftovers_join_a_neighbour():
    units = choose_units(Transformer())
    assert [u.name for u in units] == ["tok", "pos+blocks.0", "blocks.1", "blocks.2", "norm+head"]
    assert units[1].modules == ["pos", "blocks.0"]


def test_parameters_of_the_root_itself_are_a_unit_of_the_root():
    units = {unit.name: unit for unit in choose_units(Wrapper())}
    assert list(units[""].params) == ["scale"]
    assert "inner.blocks.1" in units


def test_a_tied_parameter_is_a_unit_needed_by_each_holder():
    tied = next(unit for unit in choose_units(Transformer(tie=True)) if "shared" in unit.name)
    assert tied.modules == ["tok", "head"]
    assert list(tied.params) == ["tok.weight"]


def test_every_parameter_is_in_exactly_one_unit():
    for model in (Transformer(), Transformer(tie=True), Wrapper(), nn.Linear(3, 3), nn.Sequential(nn.Linear(2, 2))):
        units = choose_units(model)
        assert sorted(n for u in units for n in u.params) == sorted(n for n, _ in model.named_parameters())


def test_choice_by_class_name_and_callable():
    assert names(Transformer(), [Block]) == ["", "blocks.0", "blocks.1", "blocks.2"]
    assert names(Transformer(), ["head", nn.Embedding]) == ["tok", "pos", "", "head"]
    assert names(Transformer(), lambda name, module: name.endswith("up"))[1] == "blocks.0.up"


def test_a_choice_that_matches_nothing_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match="'nosuch' matches no module.*Block"):
        choose_units(Transformer(), ["nosuch"])
    with pytest.raises(ConfigError, match="Conv2d.*matches no module"):
        choose_units(Transformer(), [nn.Conv2d])
