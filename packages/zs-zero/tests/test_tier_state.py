"""What stands in tiers is read, written, saved, given back and taken over as if it stood in memory."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_zero
from torch import nn
from zs_comm import ConfigError, Group
from zs_comm.testing import run_ranks
from zs_zero import safe_access
from zs_zero.checkpoint import model_state

sys.path.insert(0, str(Path(__file__).parent))

from test_checkpoint_state import Store, stored
from tier_runs import B16, F32, OPTIMIZERS, UNITS, How, Net, Training, differences, policy

NAMES = ("half of the states", "some parameters", "everything")


def check(results: list[list[str]]) -> None:
    lines = [f"rank {rank}: {line}" for rank, found in enumerate(results) for line in found]
    assert not lines, f"{len(lines)} differences\n" + "\n".join(sorted(lines)[:40])


def pairs(group: Group | None, how: How, folder: Path, names: tuple[str, ...] = NAMES, **more: Any) -> Any:
    """(label, a training in memory, the same in a tier)."""
    for name in names:
        options = policy(name, folder)
        options["offload_optimizer"] |= more
        yield name, Training(group, how, stage=3), Training(group, how, stage=3, **options)


# -- where a training begins -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizer", ["fused adamw", "momentum", "adam, amsgrad, maximize"])
def test_a_client_that_has_stepped_before(optimizer: str, tmp_path: Path) -> None:
    for dtype in (F32, B16):
        results = []
        for name in ("memory", *NAMES):
            torch.manual_seed(0)
            model = Net()
            client = OPTIMIZERS[optimizer](list(model.parameters()))  # type: ignore[arg-type]
            for _ in range(2):
                model(torch.arange(12).view(2, 6), True).float().square().mean().backward()
                client.step()
                client.zero_grad()
            training = Training.__new__(Training)
            training.how, training.rank, training.losses, training.schedule = How(dtype=dtype), 0, [], None
            training.model = model
            cast = {} if dtype == F32 else {"dtype": dtype}
            training.optimizer = zs_zero.shard(
                model, client, stage=3, units=UNITS, ignore=["own"], **cast, **policy(name, tmp_path)
            )
            before = training.result()
            results.append((name, before, training.steps(0, 2).result()))
        for name, before, after in results[1:]:
            check([differences(name, before, results[0][1]), differences(name, after, results[0][2])])


def test_a_model_of_the_meta_device(tmp_path: Path) -> None:
    class Part(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.normal_(self.weight, generator=torch.Generator().manual_seed(self.weight.numel()))
            nn.init.zeros_(self.bias)

    found = []
    for name in ("memory", "parameters", "everything"):
        with torch.device("meta"):
            model = nn.Sequential(Part(9, 40), nn.Tanh(), Part(40, 5))
        client = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer = zs_zero.shard(model, client, stage=3, device="cpu", **policy(name, tmp_path))
        for _ in range(2):
            model(torch.ones(3, 9)).square().mean().backward()
            optimizer.step()
        found.append(zs_zero.full_state_dict(model))
        optimizer.close()
    check([differences("meta", one, found[0]) for one in found[1:]])


def two_at_once(group: Group, folder: Path) -> list[str]:
    how = How(steps=2)
    wanted = Training(group, how, stage=3).steps(0, 2).result()
    both = [Training(group, how, stage=3, **policy(name, folder)) for name in ("everything", "states")]
    for step in range(2):
        for training in both:
            training.steps(step, step + 1)
    return [line for training in both for line in differences("two at once", training.result(), wanted)]


def test_two_models_share_a_folder(tmp_path: Path) -> None:
    check(run_ranks(two_at_once, 2, tmp_path))


# -- states as dictionaries --------------------------------------------------------------------------------------------
def dictionaries(group: Group | None, folder: Path) -> list[str]:
    lines = []
    for how in (How(optimizer="momentum"), How(dtype=B16, kept=(("state_dtype", B16),))):
        for name, memory, first in pairs(group, how, folder, NAMES[1:]):
            memory.steps(0, 2)
            first.steps(0, 2)
            ours, theirs = first.optimizer.state_dict(), memory.optimizer.state_dict()
            lines += [] if ours.keys() == theirs.keys() else [f"{name}: {ours.keys()} {theirs.keys()}"]
            other = Training(group, how, stage=3, **policy(name, folder)).steps(5, 6)
            weights = zs_zero.full_state_dict(first.model, masters=True)
            weights |= {key: value.clone() for key, value in memory.model.own.state_dict(prefix="own.").items()}
            zs_zero.load_full_state_dict(other.model, weights)
            other.optimizer.load_state_dict(copy.deepcopy(ours))
            other.losses = list(first.losses)
            for training in (memory, first, other):
                training.steps(2, 4)
            wanted = memory.result()
            lines += differences(f"{name} saved", first.result(), wanted)
            lines += differences(f"{name} loaded", other.result(), wanted)
    return lines


def test_state_dicts_of_one_rank(tmp_path: Path) -> None:
    check([dictionaries(None, tmp_path)])


def test_state_dicts_of_two_ranks(tmp_path: Path) -> None:
    check(run_ranks(dictionaries, 2, tmp_path))


def pieces(group: Group, folder: Path, how: How, name: str) -> Any:
    training = Training(group, how, stage=3, **policy(name, folder)).steps(0, 2)
    training.micro(2, 0)
    return given_by_lazily(model_state(training.model)), given_by_lazily(training.optimizer.__zs_shardable__())


def given_by_lazily(shardable: Any) -> Any:
    """As `given_by`, with what is not in memory read from its source."""
    found = []
    for piece in shardable.pieces():
        data = getattr(piece, "data", None)
        if data is None:
            data = torch.empty([high - low for low, high in piece.box], dtype=piece.spec.dtype)
            piece.source.load(0, data.view(-1))
        found.append((piece.spec, piece.box, data.clone(), piece.replica, piece.replicas, getattr(piece, "scope", "")))
    return found, copy.deepcopy(shardable.objects())


@pytest.mark.parametrize("dtype", [F32, B16], ids=["fp32", "bf16"])
def test_a_checkpoint_is_given_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    how = How(dtype=dtype, micros=2)
    stores: list[list[Store]] = []
    for name in ("memory", *NAMES):
        ranks = run_ranks(pieces, 2, tmp_path, how, name)
        stores.append([stored([rank[part] for rank in ranks]) for part in (0, 1)])
    for name, found in zip(NAMES, stores[1:], strict=True):
        for here, there in zip(found, stores[0], strict=True):
            wanted = {key: value.float() if "grad/" in key else value for key, value in there.whole.items()}
            whole = {key: value.float() if "grad/" in key else value for key, value in here.whole.items()}
            check([differences(name, whole, wanted)])  # gradients may wait in the dtype in which they were sent
            assert here.objects == there.objects


# -- by parameter ------------------------------------------------------------------------------------------------------
def chosen(training: Training) -> list[nn.Parameter]:
    model = training.model
    return [model.embed.weight, model.first.up.weight, model.first.gain, model.second.lone, model.first.sometimes.bias]


def read_by_parameter(training: Training) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": []}
    safe = safe_access
    for number, param in enumerate(chosen(training)):
        found |= {
            f"value {number}": safe.safe_get_full_fp32_param(param),
            f"part {number}": safe.safe_get_local_fp32_param(param),
            f"grad {number}": safe.safe_get_full_grad(param),
            f"local grad {number}": safe.safe_get_local_grad(param),
        }
        for key in ("exp_avg", "exp_avg_sq", "step"):
            found[f"{key} {number}"] = safe.safe_get_full_optimizer_state(param, key)
            found[f"local {key} {number}"] = safe.safe_get_local_optimizer_state(param, key)
    return found


def write_by_parameter(training: Training, what: str) -> None:
    optimizer, safe = training.optimizer, safe_access
    for number, param in enumerate(chosen(training), 1):
        new = torch.linspace(-1, number, param.numel()).view(param.shape)
        mine = new.reshape(-1)[optimizer.local_slice(param)]
        match what:
            case "value":
                safe.safe_set_full_fp32_param(param, new)
            case "local value":
                safe.safe_set_local_fp32_param(param, mine)
            case "grad" if param is not training.model.first.sometimes.bias:
                safe.safe_set_full_grad(param, new.bfloat16().float())
            case "local grad" if param is not training.model.first.sometimes.bias:
                safe.safe_set_local_grad(param, mine.bfloat16().float())
            case "state":
                safe.safe_set_full_optimizer_state(param, new, "exp_avg")
            case "local state":
                safe.safe_set_local_optimizer_state(param, mine.view(-1) if param.dim() else mine[0], "exp_avg")
            case "gathered":
                with zs_zero.gathered(param), torch.no_grad():
                    param.view(-1)[: number + 1] += 0.5
            case "one rank's" if param.dim():
                with zs_zero.gathered(param, modifier_rank=0), torch.no_grad():
                    param.view(-1)[min(number, param.numel() - 1)] = 3.0 * (1 + training.rank)
    if what == "updated grads":
        safe.safe_update_full_grad_vectorized(chosen(training), lambda grad, param: grad.mul_(0.5))


WRITES = ("value", "local value", "grad", "local grad", "state", "gathered", "one rank's", "updated grads")


def by_parameter(group: Group | None, folder: Path, dtype: torch.dtype, early: bool) -> list[str]:
    lines = []
    how = How(dtype=dtype, micros=1)
    names = NAMES[1:] if group is None else NAMES[2:]
    for name, memory, tier in pairs(group, how, folder, names, **({"zs_early_update": True} if early else {})):
        for training in (memory, tier):
            training.steps(0, 2)
        for step, what in enumerate(WRITES, 3):
            for training in (memory, tier):
                training.micro(4, step)
            lines += differences(f"{name}, read", read_by_parameter(tier), read_by_parameter(memory))
            for training in (memory, tier):
                write_by_parameter(training, what)
            lines += differences(f"{name}, {what}", read_by_parameter(tier), read_by_parameter(memory))
            for training in (memory, tier):
                training.update()
            lines += differences(f"{name}, step after {what}", tier.result(), memory.result())
            if lines:
                return lines
    return lines


@pytest.mark.parametrize("early", [False, True], ids=["", "early"])
@pytest.mark.parametrize("dtype", [F32, B16], ids=["fp32", "bf16"])
def test_by_parameter(dtype: torch.dtype, early: bool, tmp_path: Path) -> None:
    check([by_parameter(None, tmp_path, dtype, early)])


@pytest.mark.matrix
def test_by_parameter_among_two_ranks(tmp_path: Path) -> None:
    check(run_ranks(by_parameter, 2, tmp_path, B16, False))


def test_a_state_that_does_not_exist(tmp_path: Path) -> None:
    (_, _, tier) = next(pairs(None, How(), tmp_path, ("everything",)))
    param = tier.model.embed.weight
    assert tier.optimizer.full_state(param, "exp_avg") is None
    with pytest.raises(ConfigError, match="before the first update"):
        tier.optimizer.set_full_state(param, "exp_avg", torch.zeros(param.shape))
    with pytest.raises(ConfigError, match="shape"):
        tier.optimizer.set_full_param(param, torch.zeros(3))


# -- away and back -----------------------------------------------------------------------------------------------------
def away_and_back(group: Group | None, folder: Path) -> list[str]:
    lines = []
    for how in (How(micros=2), How(micros=2, dtype=B16, clip="early")):
        for name, memory, tier in pairs(
            group, how, folder, ("everything", "cpu", *(NAMES[:2] if group is None else ()))
        ):
            memory.steps(0, 3)
            for step in range(3):
                tier.micro(step, 0)
                tier.optimizer.offload_states(include=None if step else ["lp_grads", "optim_states"])
                tier.optimizer.reload_states()
                tier.micro(step, 1)
                tier.update()
            lines += differences(name, tier.result(), memory.result())
    return lines


def test_offload_states(tmp_path: Path) -> None:
    check([away_and_back(None, tmp_path)])
    check(run_ranks(away_and_back, 2, tmp_path))


def test_evaluation_between_steps(tmp_path: Path) -> None:
    for name, memory, tier in pairs(None, How(dtype=B16), tmp_path):
        for training in (memory, tier):
            for step in range(3):
                training.steps(step, step + 1)
                training.model.eval()
                with torch.no_grad():
                    training.losses.append(float(training.model(torch.arange(6).view(1, 6), True).float().sum()))
                training.model.train()
        check([differences(name, tier.result(), memory.result())])


def closed(group: Group | None, folder: Path) -> list[str]:
    """What is left of a training is whole and ordinary, goes on by itself, and in another tier."""
    lines = []
    for how in (How(), How(dtype=B16)) if group is None else (How(dtype=B16),):
        for name, memory, tier in pairs(group, how, folder, NAMES[1:]):
            left = []
            for training, next_one in ((memory, "memory"), (tier, "parameters")):
                training.steps(0, 2).optimizer.close()
                files = (
                    [path for path in folder.rglob("*") if path.is_file()] if training is tier and group is None else []
                )
                lines += [f"{name}: {files}"] if files else []
                client = training.optimizer.inner
                found: dict[str, Any] = {"losses": [], **dict(training.model.named_parameters())}
                for label, param in training.model.named_parameters():
                    found |= {f"{key} {label}": value for key, value in client.state.get(param, {}).items()
                              if param.numel()}  # fmt: skip
                left.append(copy.deepcopy(found))
                training.optimizer = zs_zero.shard(
                    training.model, client, mesh=group, stage=3, units=UNITS, ignore=["own"], **policy(next_one, folder)
                )
                training.steps(2, 4)
            lines += differences(f"{name}, left", left[1], left[0])
            lines += differences(f"{name}, again", tier.result(), memory.result())
            tier.optimizer.close(states=False)
    return lines


def test_closed_and_sharded_again(tmp_path: Path) -> None:
    check([closed(None, tmp_path)])
    check(run_ranks(closed, 2, tmp_path))


def test_a_copy_of_a_model(tmp_path: Path) -> None:
    training = Training(None, How(), stage=2, **policy("half of the states", tmp_path)).steps(0, 1)
    copied = copy.deepcopy(training.model)
    wanted = zs_zero.full_state_dict(training.model)
    assert all(torch.equal(value, wanted[name]) for name, value in copied.state_dict().items())
    released = Training(None, How(), stage=3, **policy("parameters", tmp_path))
    with pytest.raises(zs_zero.ReleasedParameterError, match="cannot be copied"):
        copy.deepcopy(released.model)
