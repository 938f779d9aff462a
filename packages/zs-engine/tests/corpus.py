"""Judge configurations, and train two steps of a toy model with each at the world size that its batch sizes imply."""

from __future__ import annotations

import copy
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zs_engine
from torch import Tensor, nn
from zs_comm import ConfigError
from zs_comm.config import dotted
from zs_comm.jsonfile import read_json
from zs_comm.keys import Verdict, verdicts
from zs_comm.testing import mirrored_group
from zs_engine.config import BATCH_KEYS, examine, language

ONE_BIT = ("onebitadam", "onebitlamb", "zerooneadam")
EXCLUDED = {  # a closed list: section or key -> what it switches on
    "activation_checkpointing": "activation checkpointing",
    "pipeline": "pipeline, tensor or expert parallel",
    "tensor_parallel": "pipeline, tensor or expert parallel",
    "expert_parallel": "pipeline, tensor or expert parallel",
    "compression_training": "compression",
    "quantize_training": "compression",
    "compile": "compile",
    "autotuning": "autotuning",
    "elasticity": "elasticity",
    "hybrid_engine": "hybrid engine",
}
TOO_LARGE = 80  # steps that a loss scale may be too large for: two for each halving
HIDDEN = 16  # the toy's, for what Hugging Face derives from a model's


@dataclass
class Judged:
    """A file: a verdict for each key, what it is excluded by, and why it did not train."""

    name: str
    unparseable: str = ""
    rows: list[Verdict] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    switches: list[str] = field(default_factory=list)
    world: int = 1
    failure: str | None = None

    @property
    def counts(self) -> bool:
        """Whether it is one of those that have to train."""
        return not (self.unparseable or self.errors or self.switches)


def judge(file: Path, *, train: bool = True) -> Judged:
    """Verdicts on a file as it is; then, with "auto" filled in, two steps of training unless it is excluded."""
    result = Judged(file.name)
    try:
        data, source = read_json(file)
    except ConfigError as error:
        result.unparseable = str(error).removeprefix(str(file))
        return result
    result.world = implied_world(data)
    sized = all(isinstance(data.get(key), int) for key in BATCH_KEYS[:2])
    problems = examine(data, source, world=result.world if sized else None)[2]
    result.rows = verdicts(language(), data, problems, source)
    wrong = [row for row in result.rows if row.verdict in ("unknown", "invalid")]
    wrong = [row for row in wrong if not row.text.startswith("part of ")]
    result.errors = [f"{row.where.removeprefix(f'{file.parent}/')}: {dotted(row.path)}: {row.text}" for row in wrong]
    result.switches = sorted(set(excluded(data)))
    if train and result.counts:
        try:
            train_two_steps(filled(data, result.world), result.world)
        except Exception as error:
            result.failure = f"{type(error).__name__}: {error}"
    return result


def implied_world(data: Mapping[str, Any]) -> int:
    """train / (micro * steps), where the first two are given; else 1."""
    train, micro, steps = (data.get(key) for key in BATCH_KEYS)
    if isinstance(train, int) and isinstance(micro, int):
        return max(1, train // (micro * (steps if isinstance(steps, int) else 1)))
    return 1


def excluded(data: Mapping[str, Any]) -> Iterator[str]:
    """The features of the closed list that a configuration switches on."""
    for key, feature in EXCLUDED.items():
        if _asks(data.get(key)):
            yield feature
    zero = data.get("zero_optimization")
    if isinstance(zero, Mapping) and _asks(zero.get("zenflow")):
        yield "ZenFlow"
    optimizer = data.get("optimizer")
    if isinstance(optimizer, Mapping) and str(optimizer.get("type")).lower() in ONE_BIT:
        yield "1-bit optimizers"


def _asks(value: Any) -> bool:
    """Whether a value switches something on."""
    if isinstance(value, Mapping):
        if "enabled" in value:
            return value["enabled"] is True
        return any(_asks(part) for part in value.values())
    return value not in (False, None, "auto", 0, "none", [], "")


def filled(data: Mapping[str, Any], world: int) -> dict[str, Any]:
    """What Hugging Face's trainer makes of "auto", and the batch size where none is given."""
    result = copy.deepcopy(dict(data))
    steps = result.get("gradient_accumulation_steps")
    steps = steps if isinstance(steps, int) else 1
    train, micro = result.get("train_batch_size"), result.get("train_micro_batch_size_per_gpu")
    if not isinstance(micro, int):
        micro = train // (steps * world) if isinstance(train, int) and train >= steps * world else 1
    if not isinstance(train, int):
        train = micro * steps * world
    batch = dict(zip(BATCH_KEYS, (train, micro, steps), strict=True))
    result.update({key: batch[key] for key in BATCH_KEYS if result.get(key) == "auto"})
    if train is not None and not any(isinstance(result.get(key), int) for key in BATCH_KEYS[:2]):
        result["train_micro_batch_size_per_gpu"] = micro
    if result.get("gradient_clipping") == "auto":
        result["gradient_clipping"] = 1.0
    halves = [section for name in ("bf16", "bfloat16", "fp16") if isinstance(section := result.get(name), dict)]
    for section in halves:  # one of them, the first that may be chosen
        if section.get("enabled") == "auto":
            section["enabled"] = not any(other.get("enabled") is True for other in halves)
    fill(result.get("optimizer"), lr=5e-5, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0)
    fill(result.get("scheduler"), warmup_min_lr=0, warmup_max_lr=5e-5, warmup_num_steps=10, total_num_steps=100)
    zero = result.get("zero_optimization")
    sizes = {"reduce_bucket_size": HIDDEN**2, "stage3_prefetch_bucket_size": int(0.9 * HIDDEN**2)}
    for key, value in (sizes | {"stage3_param_persistence_threshold": 10 * HIDDEN}).items():
        if isinstance(zero, dict) and zero.get(key) == "auto":
            zero[key] = value
    return result


def fill(section: Any, **values: Any) -> None:
    params = section.get("params") if isinstance(section, dict) else None
    for key, value in values.items():
        if isinstance(params, dict) and params.get(key) == "auto":
            params[key] = value


class Toy(nn.Module):
    """Two blocks and a head, tied to nothing; takes what the schedules of a configuration pass along."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, HIDDEN)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh()) for _ in range(2))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, 32)

    def forward(self, tokens: Tensor, **_: Any) -> Tensor:
        x = self.embed(tokens)  # (batch, time, HIDDEN)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(self.norm(x)).flatten(0, 1).float()
        return nn.functional.cross_entropy(logits, tokens.flatten())


def train_two_steps(config: dict[str, Any], world: int) -> None:
    """Raises what the training raises, or ArithmeticError for a loss that is not finite."""
    with tempfile.TemporaryDirectory() as folder:
        _train(elsewhere(config, folder), world)


def elsewhere(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """The configuration with its files on this machine."""
    result = copy.deepcopy(config)
    zero = result.get("zero_optimization")
    for name in ("offload_param", "offload_optimizer"):
        section = zero.get(name) if isinstance(zero, dict) else None
        if isinstance(section, dict) and section.get("nvme_path"):
            section["nvme_path"] = folder
    return result


def _train(config: dict[str, Any], world: int) -> None:
    torch.manual_seed(1)
    model = Toy()
    made = zs_engine.initialize(
        model=model,
        config=config,
        optimizer=None if "optimizer" in config else (lambda params: torch.optim.AdamW(params, lr=1e-3)),
        mesh=mirrored_group(world),
        dist_init_required=False,
    )
    engine = made[0]
    micro, steps = min(engine.train_micro_batch_size_per_gpu(), 4), engine.gradient_accumulation_steps()
    steps = steps if config.get("managed_gradient_accumulation", True) else 1
    applied = 0
    for _ in range(2 + TOO_LARGE):  # a large loss scale is halved for some steps first
        for _ in range(steps):
            loss = engine(torch.randint(0, 32, (micro, 8)))
            if not math.isfinite(loss.item()):
                raise ArithmeticError(f"the loss is {loss.item()}")
            engine.backward(loss)
            engine.step()
        applied += engine.was_step_applied()
        if applied == 2:
            break
    else:
        raise ArithmeticError(f"{applied} steps of {2 + TOO_LARGE} were applied")
    engine.destroy()


def report(folder: Path) -> tuple[str, int, int]:
    """Every file of a folder: a text, how many trained, and of how many."""
    files = [judge(file) for file in sorted(folder.iterdir()) if file.suffix == ".json"]
    lines: list[str] = []
    verdict = Counter(row.verdict for one in files for row in one.rows)
    lines.append(
        f"{len(files)} files, {sum(verdict.values())} keys: " + ", ".join(f"{n} {v}" for v, n in verdict.most_common())
    )
    unparseable = [one for one in files if one.unparseable]
    wrong = [one for one in files if one.errors]
    others = [one for one in files if one.switches and not one.errors]
    counted = [one for one in files if one.counts]
    trained = [one for one in counted if one.failure is None]
    lines += [f"\nno parser accepts, or a template: {len(unparseable)}"]
    lines += [f"  {one.name}{one.unparseable}" for one in unparseable]
    lines += [f"\ntrue errors: {sum(len(one.errors) for one in wrong)} in {len(wrong)} files"]
    lines += [f"  {error}" for one in wrong for error in one.errors]
    features = Counter(feature for one in others for feature in one.switches)
    lines += [
        f"\nfeatures of the closed list: {len(others)} files",
        *(f"  {n:4} {name}" for name, n in features.most_common()),
    ]
    worlds = Counter(one.world for one in counted)
    lines += [f"\nworld sizes: {', '.join(f'{world} ({n})' for world, n in sorted(worlds.items()))}"]
    lines += [f"did not train: {len(counted) - len(trained)}"]
    lines += [f"  {one.name}: {one.failure}" for one in counted if one.failure is not None]
    share = 100 * len(trained) / max(1, len(counted))
    lines += [f"\ntrained two steps: {len(trained)} of {len(counted)} = {share:.1f} %"]
    return "\n".join(lines), len(trained), len(counted)
