"""The optimizers of `zs_zero.optimizers` against their published formulas, written down a second time with numpy.

fp64 throughout where the formula is; Muon's iteration also as torch has it.
"""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zs_zero import optimizers
from zs_zero.host_optimizer import TorchHostOptimizer
from zs_zero.optimizers.muon import orthogonal

STEPS = 12
Array = Any


def grads_of(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source) for _ in range(STEPS)]


def run(optimizer: torch.optim.Optimizer, param: nn.Parameter, grads: list[Tensor]) -> list[Array]:
    """The parameter after each step."""
    found = []
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()
        found.append(param.detach().double().numpy().copy())
    return found


def start(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype))


def close(found: list[Array], wanted: list[Array], *, rtol: float) -> None:
    assert len(found) == len(wanted) == STEPS
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol, err_msg=f"step {step}")


# -- LAMB (You et al., 2020, algorithm 2) ------------------------------------------------------------------------------
def lamb_of_the_paper(p: Array, grads: list[Array], *, lr: float, decay: float, correct: bool, low: float, high: float,
                      eps: float = 1e-6, inside: bool = False, step_size: bool = False) -> list[Array]:  # fmt: skip
    b1, b2, found = 0.9, 0.999, []
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        one, two = (1 - b1**t, 1 - b2**t) if correct else (1.0, 1.0)
        mean, variance = (m, v) if step_size else (m / one, v / two)
        denominator = np.sqrt(variance + eps) if inside else np.sqrt(variance) + eps
        update = mean / denominator + decay * p
        weight, length = np.sqrt((p * p).sum()), np.sqrt((update * update).sum())
        ratio = np.clip(weight / length, low, high) if weight > 0 and length > 0 else 1.0
        p = p - lr * (np.sqrt(two) / one if step_size else 1.0) * ratio * update
        found.append(p)
    return found


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"eps_inside_sqrt": True}, {"correct_step_size": True}, {"max_coeff": 0.9, "min_coeff": 0.8}],
    ids=str,
)
def test_lamb(options: dict[str, Any], correct: bool) -> None:
    param, grads = start((5, 9)), grads_of((5, 9))
    wanted = lamb_of_the_paper(
        param.detach().numpy().copy(), [g.double().numpy() for g in grads], lr=0.02, decay=0.1, correct=correct,
        low=options.get("min_coeff", 0.01), high=options.get("max_coeff", 10.0),
        inside=options.get("eps_inside_sqrt", False), step_size=options.get("correct_step_size", False),
    )  # fmt: skip
    optimizer = optimizers.Lamb([param], lr=0.02, eps=1e-6, weight_decay=0.1, bias_correction=correct, **options)
    close(run(optimizer, param, grads), wanted, rtol=1e-12)


def test_lamb_of_zero_weights_takes_adams_step() -> None:
    param = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    param.grad = torch.tensor([1.0, -2.0, 3.0, 0.0], dtype=torch.float64)
    optimizers.Lamb([param], lr=0.5, eps=0.0).step()
    assert param[:3].tolist() == pytest.approx([-0.5, 0.5, -0.5], rel=1e-12)


# -- Lion (Chen et al., 2023, algorithm 2) -----------------------------------------------------------------------------
def test_lion() -> None:
    param, grads = start((6, 7)), grads_of((6, 7))
    p, m, wanted = param.detach().numpy().copy(), np.zeros((6, 7)), []
    for grad in (g.double().numpy() for g in grads):
        update = np.sign(0.95 * m + (1 - 0.95) * grad)
        p = p - 0.01 * (update + 0.3 * p)
        m = 0.98 * m + (1 - 0.98) * grad
        wanted.append(p)
    close(
        run(optimizers.Lion([param], lr=0.01, betas=(0.95, 0.98), weight_decay=0.3), param, grads), wanted, rtol=1e-12
    )


def test_lion_has_the_bits_of_the_host_optimizer() -> None:
    param, grads = start((37,), torch.float32), grads_of((37,))
    state = {"param": param.detach().clone(), "exp_avg": torch.zeros(37)}
    host, hyper = TorchHostOptimizer(), {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    run(optimizers.Lion([param], **hyper), param, grads)
    for step, grad in enumerate(grads, start=1):
        host.step("lion", state, grad, hyper=hyper, step=step, factor=1.0)
    assert torch.equal(param.detach(), state["param"])


# -- Adam (Kingma & Ba, 2015, algorithm 1) -----------------------------------------------------------------------------
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("correct", [True, False])
def test_adam(correct: bool, decoupled: bool) -> None:
    param, grads = start((4, 5)), grads_of((4, 5))
    kind, twin = torch.optim.AdamW if decoupled else torch.optim.Adam, copy.deepcopy(param)
    p, m, v, wanted = param.detach().numpy().copy(), 0.0, 0.0, []
    for t, grad in enumerate((g.double().numpy() for g in grads), start=1):
        g = grad if decoupled else grad + 0.2 * p
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + (1 - 0.95) * g * g
        one, two = (1 - 0.9**t, 1 - 0.95**t) if correct else (1.0, 1.0)
        p = (p * (1 - 0.01 * 0.2) if decoupled else p) - 0.01 * (m / one) / (np.sqrt(v / two) + 1e-8)
        wanted.append(p)
    options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.2}
    found = run(optimizers.Adam([param], **options, bias_correction=correct, decoupled=decoupled), param, grads)
    close(found, wanted, rtol=1e-12)
    if correct:
        close(found, run(kind([twin], **options), twin, grads), rtol=1e-12)


# -- Muon (Jordan et al., 2024) ----------------------------------------------------------------------------------------
def newton_schulz(matrix: Array, steps: int) -> Array:
    """The quintic of the article, in fp64: X <- a X + b (X X^T) X + c (X X^T)^2 X."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / np.sqrt((x * x).sum())
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize("shape", [(6, 14), (14, 6), (8, 8), (1, 5)], ids=str)
@pytest.mark.parametrize(("method", "bound"), [("standard", 0.03), ("gram", 2e-4)])
def test_orthogonal(method: str, bound: float, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonal(matrix, 5, method=method).double().numpy()
    np.testing.assert_allclose(found, newton_schulz(matrix.double().numpy(), 5), atol=bound)
    values = np.linalg.svd(found, compute_uv=False)
    assert values.min() > 0.3 and values.max() < 1.3
    u, _, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    assert np.abs(u.T @ found @ vt.T - np.diag(np.diag(u.T @ found @ vt.T))).max() < 0.02  # same singular vectors


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(6, 14), (14, 6), (6, 3, 2)], ids=str)
def test_muon(shape: tuple[int, ...], nesterov: bool) -> None:
    param, grads = start(shape, torch.float32), grads_of(shape)
    p, m, wanted = param.detach().double().numpy().copy(), np.zeros(shape), []
    for grad in (g.double().numpy() for g in grads):
        m = 0.9 * m + (1 - 0.9) * grad
        update = (1 - 0.9) * grad + 0.9 * m if nesterov else m
        matrix = update.reshape(shape[0], -1)
        scale = np.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1]))
        p = p * (1 - 0.02 * 0.1) - 0.02 * scale * newton_schulz(matrix, 5).reshape(shape)
        wanted.append(p)
    options: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    twin = copy.deepcopy(param)
    found = run(optimizers.Muon([param], **options, ns_method="gram"), param, grads)
    close(found, wanted, rtol=1e-4)
    close(run(optimizers.Muon([twin], **options), twin, grads), wanted, rtol=2e-2)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9")
@pytest.mark.parametrize("shape", [(6, 14), (14, 6)], ids=str)
def test_muon_is_torchs(shape: tuple[int, int]) -> None:
    param, grads = start(shape, torch.float32), grads_of(shape)
    twin = copy.deepcopy(param)
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    close(run(optimizers.Muon([param], **options), param, grads), run(torch.optim.Muon([twin], **options), twin, grads),
          rtol=1e-2)  # fmt: skip


def test_muon_trains_the_rest_by_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    model[0].weight.use_muon = False
    before = [param.detach().clone() for param in model.parameters()]
    muon = optimizers.Muon(model.parameters(), lr=0.5, adam_lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-10)
    assert [(g["use_muon"], len(g["params"]), g["lr"]) for g in muon.param_groups] == [(True, 1, 0.5), (False, 2, 0.01)]
    adam = torch.optim.AdamW([before[0], before[2]], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-10)
    for step in range(4):
        source = torch.Generator().manual_seed(step)
        for param, twin in zip(model.parameters(), before, strict=True):
            param.grad = twin.grad = torch.randn(param.shape, generator=source)
        muon.step()
        adam.step()
    torch.testing.assert_close(model[0].weight.detach(), before[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model[1].bias.detach(), before[2], rtol=1e-6, atol=1e-7)
    assert (model[1].weight.detach() - before[1]).abs().min() > 0.01


def test_which_parameters_are_muons() -> None:
    model = nn.ModuleDict({"token_embed": nn.Embedding(3, 4), "body": nn.Linear(4, 4), "lm_head": nn.Linear(4, 3)})
    model["body"].bias.use_muon = False
    optimizers.mark_for_muon(model)
    assert [name for name, p in model.named_parameters() if p.use_muon] == ["body.weight"]
    groups = [{"params": list(model.parameters()), "lr": 0.25, "tag": "x"}]
    made = optimizers.Muon(groups, lr=0.5, adam_lr=0.01, momentum=0.8)
    assert [(len(g["params"]), g["lr"], g["tag"]) for g in made.param_groups] == [(1, 0.25, "x"), (4, 0.25, "x")]
    assert made.param_groups[0]["momentum"] == 0.8 and "momentum" not in made.param_groups[1]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: optimizers.Lion(p, lr=-1.0), "lr is a number of at least 0"),
        (lambda p: optimizers.Lion(p, betas=(0.9, 1.0)), r"betas are two numbers in \[0, 1\)"),
        (lambda p: optimizers.Adam(p, eps=-1.0), "eps is a number"),
        (lambda p: optimizers.Lamb(p, max_coeff=0.1, min_coeff=0.2), "max_coeff is at least min_coeff"),
        (lambda p: optimizers.Muon(p, ns_method="newton"), "ns_method is one of standard, gram"),
        (lambda p: optimizers.Muon(p, ns_steps=0), "ns_steps is a whole number"),
        (lambda p: optimizers.Muon(p, momentum=1.0), r"momentum is a number in \[0, 1\)"),
        (lambda p: optimizers.Muon(p, betas=(2.0, 0.9)), "betas are two"),
        (lambda p: optimizers.Muon([{"params": p, "use_muon": True}]), r"shape \(3,\) belongs to Adam"),
        (lambda p: optimizers.Muon([{"params": p, "use_muon": "yes"}]), "use_muon=True or False"),
    ],
)
def test_bad_values(make: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make([nn.Parameter(torch.ones(3))])


@pytest.mark.parametrize("kind", [optimizers.Adam, optimizers.Lamb, optimizers.Lion, optimizers.Muon])
def test_state_dict_closure_and_missing_gradients(kind: Any) -> None:
    params = [start((4, 6), torch.float32), start((5, 4), torch.float32)]
    optimizer = kind(params)
    assert optimizer.step(lambda: 1.5) == 1.5  # no gradients: nothing happens
    assert not optimizer.state
    params[0].grad = torch.ones(4, 6)
    optimizer.step()
    twin = copy.deepcopy(params)
    other = kind(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors
    for group in (params, twin):
        group[0].grad, group[1].grad = torch.full((4, 6), 0.5), torch.full((5, 4), 0.25)
    optimizer.step()
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twin, strict=True))
    params[0].grad = torch.ones(4, 6).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        optimizer.step()
