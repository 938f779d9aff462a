"""The plain host optimizer passes the conformance check, and the check catches broken ones."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from zs_zero.host_optimizer import HYPER, STATE, TorchHostOptimizer
from zs_zero.testing import check_host_optimizer


@pytest.mark.parametrize("chunk_numel", [16, 64, 1 << 20])
def test_torch_host_optimizer_conforms(chunk_numel: int) -> None:
    check_host_optimizer(lambda: TorchHostOptimizer(chunk_numel=chunk_numel))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_host_optimizer(TorchHostOptimizer)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("chunk_numel", [0, 8, 100])
def test_chunks_are_whole_vectors(chunk_numel: int) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        TorchHostOptimizer(chunk_numel=chunk_numel)


def test_kinds_have_states_and_hyper_parameters() -> None:
    assert STATE.keys() == HYPER.keys() == {"adamw", "adam", "sgd", "adagrad", "lion"}
    assert all(names[0] == "param" for names in STATE.values())


# -- the check finds broken optimizers -------------------------------------------------------------------------------


class Mutant(TorchHostOptimizer):
    """An optimizer whose arguments are spoilt on the way in."""

    def spoil(self, call: dict[str, Any]) -> None:
        pass

    def step(self, kind: str, state: Mapping[str, Tensor], grad: Tensor, **options: Any) -> None:
        call = {"kind": kind, "state": state, "grad": grad, **options}
        self.spoil(call)
        super().step(call.pop("kind"), call.pop("state"), call.pop("grad"), **call)


class ScalesTheGradient(Mutant):
    def spoil(self, call: dict[str, Any]) -> None:
        if call["factor"] == 0.5 and call["grad"].dtype == torch.bfloat16:
            call["grad"].mul_(call["factor"])
            call["factor"] = 1.0


class RoundsTheScaledGradient(Mutant):
    """The product in the gradient's dtype."""

    def spoil(self, call: dict[str, Any]) -> None:
        if call["factor"] != 1.0 and call["grad"].is_floating_point():
            call["grad"], call["factor"] = call["grad"] * call["factor"], 1.0


class IgnoresTheFactor(Mutant):
    def spoil(self, call: dict[str, Any]) -> None:
        call["factor"] = 1.0


class StepOff(Mutant):
    def spoil(self, call: dict[str, Any]) -> None:
        call["step"] += call["step"] > 1


class CountsByItself(Mutant):
    """Right for one tensor that is stepped from its first step on."""

    count = 0

    def spoil(self, call: dict[str, Any]) -> None:
        if call["step"] >= 1:
            call["step"] = self.count = 1 if call["step"] == 1 else self.count + 1


class CoupledDecay(Mutant):
    def spoil(self, call: dict[str, Any]) -> None:
        if call["kind"] == "adamw":
            call["kind"] = "adam"


class ForgetsTheOutput(Mutant):
    def spoil(self, call: dict[str, Any]) -> None:
        if call.get("out") is not None and call["out"].dtype == torch.float16:
            call["out"] = call["out"].clone()


class TruncatesTheOutput(Mutant):
    """bf16 by dropping bits instead of rounding."""

    def step(self, kind: str, state: Mapping[str, Tensor], grad: Tensor, **options: Any) -> None:
        super().step(kind, state, grad, **options)
        out = options.get("out")
        if out is not None and out.dtype == torch.bfloat16:
            out.view(torch.int16).copy_(state["param"].contiguous().view(torch.int32) >> 16)


class FlushesDenormals(TorchHostOptimizer):
    def step(self, kind: str, state: Mapping[str, Tensor], grad: Tensor, **options: Any) -> None:
        super().step(kind, state, grad, **options)
        out = options.get("out")
        if out is not None:
            out[out.abs() < torch.finfo(torch.bfloat16).tiny] = 0.0


class UnpaddedTail(TorchHostOptimizer):
    """torch's fused kernel straight on the slice: its last elements are rounded differently."""

    def step(self, kind: str, state: Mapping[str, Tensor], grad: Tensor, **options: Any) -> None:
        if kind != "adamw" or options["factor"] != 1.0 or grad.dtype != torch.float32:
            super().step(kind, state, grad, **options)
            return
        hyper = options["hyper"]
        torch.optim.adamw.adamw(  # type: ignore[attr-defined]
            [state["param"]], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [],
            [torch.tensor(options["step"] - 1.0)],
            fused=True, amsgrad=False, beta1=hyper["betas"][0], beta2=hyper["betas"][1], lr=hyper["lr"],
            weight_decay=hyper["weight_decay"], eps=hyper["eps"], maximize=False,
        )  # fmt: skip


class TouchesBeyond(TorchHostOptimizer):
    def step(self, kind: str, state: Mapping[str, Tensor], grad: Tensor, **options: Any) -> None:
        super().step(kind, state, grad, **options)
        if grad.numel() == 17 and options["factor"] == 1.0:
            for tensor in state.values():
                torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + 17).zero_()


class AcceptsAnyKey(Mutant):
    def spoil(self, call: dict[str, Any]) -> None:
        call["hyper"] = {name: call["hyper"][name] for name in HYPER.get(call["kind"], ()) if name in call["hyper"]}


class StepsBeforeItLooks(Mutant):
    def spoil(self, call: dict[str, Any]) -> None:
        call["state"]["param"].add_(1e-3 if call["step"] < 1 else 0.0)


class NormInFp32(TorchHostOptimizer):
    def sum_of_squares(self, grad: Tensor) -> tuple[float, bool]:
        total = float(grad.float().square().sum())
        return total, total < float("inf")


class NormMissesNan(TorchHostOptimizer):
    def sum_of_squares(self, grad: Tensor) -> tuple[float, bool]:
        return super().sum_of_squares(grad)[0], not bool(grad.isinf().any())


class OtherProtocol(TorchHostOptimizer):
    PROTOCOL = 0


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (ScalesTheGradient, "the gradient is left as it is"),
        (RoundsTheScaledGradient, "the factor is rounded to fp32"),
        (IgnoresTheFactor, "the factor is rounded to fp32"),
        (StepOff, "the bits of torch's optimizer"),
        (CountsByItself, "keeps nothing between calls"),
        (CoupledDecay, "the bits of torch's optimizer"),
        (ForgetsTheOutput, "the copy is torch's cast"),
        (TruncatesTheOutput, "the copy is torch's cast"),
        (FlushesDenormals, "denormals included"),
        (UnpaddedTail, "the bits of torch's optimizer"),
        (TouchesBeyond, "nothing beyond the slice is touched"),
        (AcceptsAnyKey, "what does not fit is a ValueError"),
        (StepsBeforeItLooks, "and changes nothing"),
        (NormInFp32, "the sum of squares is exact"),
        (NormMissesNan, "the sum of squares is exact"),
        (OtherProtocol, "PROTOCOL is there"),
    ],
)
def test_check_finds(broken: type[TorchHostOptimizer], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_host_optimizer(broken)
