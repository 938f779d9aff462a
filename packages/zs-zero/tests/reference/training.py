"""Mixed precision training written out by hand, in one process, for any number of ranks; it imports nothing of zs.

    for each rank and micro-step:  gradients of (loss x scale / micro-steps), in the model's dtype
    add up                         a rank's micro-steps first and ranks last, or the other way round
    unscale                        by the scale of this step, into fp32
    non-finite?                    skip the update, lower the scale
    clip, AdamW on fp32 masters, copy them into the model's dtype
    the scale for the next step

The sum over the ranks runs in rank order in fp32, is multiplied by 1 / ranks and rounded once to the dtype
that travels.
Loss scaling: Micikevicius et al., Mixed Precision Training (2018), section 3.2, with the hysteresis that Megatron-LM
and DeepSpeed added. AdamW: Loshchilov and Hutter (2019), algorithm 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from reference.toy import Micro, Toy, loss_of
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How losses are scaled. `window` 0: the scale is constant."""

    initial: float
    window: int = 0
    hysteresis: int = 2
    consecutive: bool = False
    minimum: float = 1.0


class Scale:
    """The loss scale over the steps.

    It doubles at every update that was taken with `window`, 2 x `window`, ... others before it since the last overflow.
    Overflows use up `hysteresis` lives; one that finds a single life left halves the scale, and so does every later
    one. Lives come back when the scale grows, or (`consecutive`) at every update that is taken.
    """

    def __init__(self, how: Scaling) -> None:
        self.how = how
        self.value = how.initial
        self.taken = 0  # updates since the last overflow
        self.lives = how.hysteresis

    def after(self, overflow: bool) -> None:
        if not self.how.window:
            return
        if overflow:
            self.taken = 0
            if self.lives > 1:
                self.lives -= 1
            else:
                self.value = max(self.value / 2, self.how.minimum)
            return
        grows = self.taken > 0 and self.taken % self.how.window == 0
        self.taken += 1
        if grows or self.how.consecutive:
            self.lives = self.how.hysteresis
        if grows:
            self.value *= 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One training."""

    dtype: torch.dtype = torch.float32
    scaling: Scaling | None = None
    skips: bool = True  # a step with a non-finite gradient is skipped, also where nothing is scaled
    world: int = 1
    accumulate: int = 1
    clip: float | None = None
    ranks_first: bool = False  # add the ranks' gradients of each micro-step first (stages 2, 3)
    travels: torch.dtype | None = None  # dtype of gradients between ranks; None: the model's
    adds: torch.dtype | None = None  # dtype that sums over micro-steps are rounded to; None: the model's
    steps: int = 9
    warmup: int = 0  # steps that are taken until the learning rate is whole
    inject: frozenset[tuple[int, int, int]] = frozenset()  # (step, micro-step, rank) with an infinite loss


@dataclass
class Trained:
    """What a training leaves behind."""

    losses: list[list[float]] = field(default_factory=list)  # by rank: of every micro-step
    norms: list[float] = field(default_factory=list)  # of every step's unscaled mean gradient; not finite when skipped
    scales: list[float] = field(default_factory=list)  # that each step's losses were multiplied by
    skipped: list[int] = field(default_factory=list)  # which steps were
    rates: list[float] = field(default_factory=list)  # learning rate of every step
    masters: dict[str, Tensor] = field(default_factory=dict)  # fp32, at the end
    values: dict[str, Tensor] = field(default_factory=dict)  # the model's parameters at the end, in their dtype


class AdamW:
    """Decoupled weight decay on fp32 masters; a parameter without a gradient is left alone, its step count too."""

    rate, betas, eps, decay = 3e-3, (0.9, 0.99), 1e-8, 0.05

    def __init__(self, masters: dict[str, Tensor]) -> None:
        self.masters = masters
        self.steps = dict.fromkeys(masters, 0)
        self.mean = {name: torch.zeros_like(value) for name, value in masters.items()}
        self.square = {name: torch.zeros_like(value) for name, value in masters.items()}

    def step(self, gradients: dict[str, Tensor | None], rate: float) -> None:
        first, second = self.betas
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            self.steps[name] += 1
            master, mean, square = self.masters[name], self.mean[name], self.square[name]
            master.mul_(1 - rate * self.decay)
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            size = rate / (1 - first ** self.steps[name])
            denominator = (square.sqrt() / math.sqrt(1 - second ** self.steps[name])).add_(self.eps)
            master.addcdiv_(mean, denominator, value=-size)


Gradients = dict[str, Tensor | None]


def train(plan: Plan, norms: Sequence[float] = ()) -> Trained:
    """Trains the toy on `plan.world` ranks' data.

    Another training's `norms`, when given, are what is clipped by: they are added up in another order there, and one
    bit of a norm is in time many bits of a loss. That they are right is for the caller to compare.
    """
    model, out = Toy(), Trained(losses=[[] for _ in range(plan.world)])
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    masters = {name: param.detach().clone() for name, param in params.items()}
    for param in model.parameters():
        param.data = param.data.to(plan.dtype)
    adamw, scale = AdamW(masters), Scale(plan.scaling or Scaling(initial=1.0))
    for step in range(plan.steps):
        backwards = [
            [
                _gradients(model, params, Micro(step, micro, rank), plan, scale.value, out)
                for micro in range(plan.accumulate)
            ]
            for rank in range(plan.world)
        ]
        summed = {name: _sum([[g[name] for g in own] for own in backwards], plan) for name in params}
        gradients: Gradients = {
            name: None if total is None else total.float() * (1 / scale.value) for name, total in summed.items()
        }
        there = [gradient for gradient in gradients.values() if gradient is not None]
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in there))
        rate = adamw.rate * min(1.0, (step - len(out.skipped) + 1) / max(1, plan.warmup))
        out.norms.append(norm)
        out.scales.append(scale.value)
        out.rates.append(rate)
        overflow = plan.skips and not all(bool(gradient.isfinite().all()) for gradient in there)
        if overflow:
            out.skipped.append(step)
        else:
            divisor = (norms[step] if norms else norm) + 1e-6
            if plan.clip is not None and not divisor <= plan.clip:
                for gradient in there:
                    gradient.mul_(plan.clip / divisor)
            adamw.step(gradients, rate)
            for name, param in params.items():
                param.data.copy_(masters[name])
        scale.after(overflow)
    out.masters = masters
    out.values = {name: param.detach().clone() for name, param in model.named_parameters()}
    return out


def _gradients(
    model: nn.Module, params: dict[str, nn.Parameter], at: Micro, plan: Plan, scale: float, out: Trained
) -> Gradients:
    """Of one micro-step on one rank, in the model's dtype."""
    loss, recorded = loss_of(model, at, plan.inject)
    out.losses[at.rank].append(recorded)
    found = torch.autograd.grad(loss * (scale / plan.accumulate), list(params.values()), allow_unused=True)
    return dict(zip(params, found, strict=True))


def _sum(backwards: list[list[Tensor | None]], plan: Plan) -> Tensor | None:
    """One parameter's gradient [rank][micro-step], as the mean over the ranks of the sum over the micro-steps."""
    if plan.ranks_first:
        each = [_over_ranks([own[micro] for own in backwards], plan) for micro in range(plan.accumulate)]
        return _over_micro_steps(each, plan)
    return _over_ranks([_over_micro_steps(own, plan) for own in backwards], plan)


def _over_micro_steps(gradients: list[Tensor | None], plan: Plan) -> Tensor | None:
    """The sum, rounded after every addition, as autograd rounds."""
    total = None
    for gradient in gradients:
        if gradient is not None:
            total = gradient if total is None else (total.float() + gradient.float()).to(plan.adds or plan.dtype)
    return total


def _over_ranks(gradients: list[Tensor | None], plan: Plan) -> Tensor | None:
    """The mean: summed in fp32 in rank order, rounded once."""
    like = next((gradient for gradient in gradients if gradient is not None), None)
    if like is None or plan.world == 1:
        return like
    total, travels = torch.zeros_like(like, dtype=torch.float32), plan.travels or plan.dtype
    for gradient in gradients:
        if gradient is not None:
            total += gradient.to(travels).float()
    return (total * (1 / plan.world)).to(travels)
