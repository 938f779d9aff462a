"""A released parameter: whatever needs no values answers, everything else names it and the way out."""

import copy
import io
import pickle

import pytest
import torch
import zs_zero
from torch import nn
from zs_comm.testing import run_ranks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.second(self.first(x))


def touch_everything(group):
    model = Net()
    zs_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3, mesh=group)
    weight = model.first.weight
    answers = {
        "shape": tuple(weight.shape),
        "size": weight.size(0),
        "dim": weight.dim(),
        "numel": weight.numel(),
        "dtype": weight.dtype is torch.float32,
        "device": weight.device.type,
        "requires_grad": weight.requires_grad,
        "grad": weight.grad is None,
        "leaf": weight.is_leaf,
        "is_parameter": isinstance(weight, nn.Parameter),
        "hash": weight in {weight},
        "names": [name for name, _ in model.named_parameters()],
        "repr": repr(weight),
        "floating": weight.is_floating_point() and torch.is_floating_point(weight),
        "len": len(weight),
    }
    attempts = {
        "sum": lambda: weight.sum(),
        "add": lambda: weight + 1,
        "radd": lambda: torch.ones(5, 6) + weight,
        "clone": lambda: weight.clone(),
        "cat": lambda: torch.cat([torch.ones(5, 6), weight]),
        "equal": lambda: torch.equal(weight, weight),
        "eq": lambda: weight == 1,
        "numpy": lambda: weight.detach().numpy(),
        "direct numpy": lambda: weight.numpy(),
        "tolist": lambda: weight.tolist(),
        "item": lambda: weight[0, 0].item(),
        "index": lambda: weight[0],
        "iter": lambda: list(weight),
        "data": lambda: weight.data,
        "set data": lambda: setattr(weight, "data", torch.ones(5, 6)),
        "T": lambda: weight.T,
        "mT": lambda: weight.mT,
        "real": lambda: weight.real,
        "detach": lambda: weight.detach(),
        "view": lambda: weight.view(-1),
        "data_ptr": lambda: weight.data_ptr(),
        "storage": lambda: weight.untyped_storage(),
        "copy_": lambda: weight.copy_(torch.ones(5, 6)),
        "fill_": lambda: weight.fill_(1.0),
        "setitem": lambda: weight.__setitem__(0, 1.0),
        "iadd": lambda: weight.add_(1),
        "init": lambda: nn.init.normal_(weight),
        "linear": lambda: nn.functional.linear(torch.ones(6), weight),
        "forward of a part": lambda: nn.Linear.forward(model.first, torch.ones(6)),
        "to": lambda: weight.to(torch.float64),
        "cpu": lambda: weight.double(),
        "float": lambda: float(weight.sum()),
        "state_dict": lambda: model.state_dict(),
        "part's state_dict": lambda: model.second.state_dict(),
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.dumps(weight),
        "torch.save": lambda: torch.save(weight, io.BytesIO()),
        "array": lambda: memoryview(weight.__array__()),
        "dlpack": lambda: weight.__dlpack__(),
        "clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        "get_total_norm": lambda: nn.utils.clip_grad_value_(model.parameters(), 1.0),
        "format": lambda: f"{weight.norm():.2f}",
    }
    refused = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            refused[name] = None
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"
    return answers, refused


def test_released_parameters_answer_or_refuse_by_name():
    for answers, refused in run_ranks(touch_everything, 2):
        assert answers.pop("repr").startswith("Parameter 'first.weight' (released: shape (5, 6)")
        assert answers.pop("names") == ["first.weight", "first.bias", "second.weight", "second.bias"]
        assert answers == {
            "shape": (5, 6), "size": 5, "dim": 2, "numel": 30, "dtype": True, "device": "cpu", "requires_grad": True,
            "grad": True, "leaf": True, "is_parameter": True, "hash": True, "floating": True, "len": 5,
        }  # fmt: skip
        for name, error in refused.items():
            assert error is not None, f"{name} went through"
            expected = "second" if "part's" in name else "first"
            assert expected in error and "zs_zero." in error, (name, error)


class Special(nn.Parameter):
    pass


def released_and_whole_class(group):
    model = Net()
    model.first.weight = Special(model.first.weight.detach())
    zs_zero.shard(model, stage=3, mesh=group)
    released = type(model.first.weight).__name__
    with zs_zero.gathered(model):
        return released, type(model.first.weight) is Special and type(model.first.bias) is nn.Parameter


def test_the_class_of_a_parameter_comes_back_when_gathered():
    assert run_ranks(released_and_whole_class, 2) == [("ReleasedSpecial", True)] * 2


def plain_state_dict(group):
    model = Net()
    reference = {key: value.clone() for key, value in model.state_dict().items()}
    zs_zero.shard(model, torch.optim.SGD(model.parameters()), stage=2, mesh=group)
    return [torch.equal(model.state_dict()[key], value) for key, value in reference.items()]


@pytest.mark.parametrize("world", [1, 2])
def test_plain_state_dict_works_where_parameters_are_whole(world):
    assert run_ranks(plain_state_dict, world)[0] == [True] * 4
