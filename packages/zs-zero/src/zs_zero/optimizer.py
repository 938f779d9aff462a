"""The optimizer that `zs_zero.shard` returns: the client's own, run on this rank's pieces.

Order of a step, the same for every stage and precision:

    finish reduction -> agree -> client's optimizer on the pieces -> write back -> gather (stages 1, 2) or release (3)
"""

import abc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from zs_comm import ConfigError, Group, ZsError, agree, exchange

from .flat import Flat, HeldPiece
from .optimizer_state import OptimizerState
from .plan import Plan

if TYPE_CHECKING:
    from .runtime import Runtime


class ShardedOptimizer(torch.optim.Optimizer, abc.ABC):
    """What an engine, a checkpoint or a pipeline needs to know of an optimizer whose state is spread over ranks."""

    stage: int
    group: Group

    @abc.abstractmethod
    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards inside accumulate locally and communicate nothing."""

    @abc.abstractmethod
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the gradients to a global 2-norm of at most `max_norm`; returns the norm before (0-dim fp32)."""

    @abc.abstractmethod
    def abort_step(self) -> None:
        """Drops this window's gradients: parameters, states and counters are as before it."""


class TornError(ZsError, RuntimeError):
    """The client's optimizer raised half-way: its state is neither the old nor the new one."""


class ZeroOptimizer(ShardedOptimizer):
    """The client's optimizer over sharded state. `step()` ends an accumulation window.

    `param_groups` are the client's own dictionaries, so learning rates set on either object count for both, and a
    scheduler may hold either. Gradients are consumed by `step()`.
    """

    def __init__(self, runtime: "Runtime", client: torch.optim.Optimizer | None) -> None:
        self._runtime = runtime
        self.inner = client
        self.stage = runtime.stage
        self.group = runtime.groups.dp
        self.torn = False
        self._stepping = False
        groups = client.param_groups if client is not None else [{"params": list(runtime.model.parameters())}]
        super().__init__(groups, dict(client.defaults) if client is not None else {})
        if client is None:
            self._pieces: list[list[Tensor]] = []
            return
        self.param_groups = client.param_groups
        self.state = client.state
        self._owned: list[tuple[Tensor, Flat, HeldPiece]] = []
        self._by_param: dict[int, list[tuple[Tensor, Flat, HeldPiece]]] = {}
        self._pieces = self._make_pieces(client)
        self._guard = client.register_step_pre_hook(self._only_from_here)

    # -- the user's loop ----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Ends the window: reduces what is not reduced, updates this rank's pieces, spreads the new values.

        A parameter without a gradient on any rank is left alone, as in torch. On an error before the update began,
        parameters and states are as before and `abort_step()` clears the window; after that the optimizer is `torn`.

        Raises:
            TornError: after an update that failed half-way.
            ZsError: when the last backward raised, or another rank's update failed (RankDisagreement).
        """
        self.check_usable()
        self._runtime.check_not_borrowed("step()")
        client = self._client("step")
        loss = None
        if closure is not None:
            if not self._runtime.whole_state:
                raise ConfigError("step(closure) needs whole parameters: stage 0")
            inner_closure = closure

            def closure() -> Any:
                with torch.enable_grad():
                    value = inner_closure()
                self._reduce()
                self._set_gradients()
                return value

        else:
            self._reduce()
            self._runtime.take_writes(self._runtime.flats)
            self._set_gradients()
        self._stepping = self.torn = True
        error: Exception | None = None
        self._swap_in()
        try:
            loss = client.step(closure) if closure is not None else client.step()
        except Exception as raised:
            error = raised
        finally:
            self._swap_out()
            self._stepping = False
        agree(self.group, error, what="optimizer step")
        self._runtime.after_update()
        self.torn = False
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients of the window, reduced ones too."""
        self.check_usable()
        self._runtime.drop_gradients()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside keep whole local gradients and communicate none (parameters are gathered as ever)."""
        before, self._runtime.sync = self._runtime.sync, False
        try:
            yield
        finally:
            self._runtime.sync = before

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Reduces, then scales all gradients by `min(1, max_norm / (norm + 1e-6))`, as torch's function does.

        Call it on every rank between backward and step, in the place of torch's (which sees this rank's gradients only,
        and raises at stage 3). Returns the norm before clipping (0-dim fp32, CPU).
        """
        norm = self.grad_norm()
        factor = max_norm / (float(norm) + 1e-6)
        if not factor >= 1.0:  # also for a norm that is not a number: torch spreads it, and so do we
            for flat in self._runtime.trainable:
                if flat.grad is not None:
                    flat.grad.mul_(factor)
                else:
                    for param in flat.params:
                        if param.grad is not None:
                            param.grad.mul_(factor)
        return norm

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The global 2-norm of the window's mean gradient (0-dim fp32, CPU). Collective."""
        self.check_usable()
        self._reduce()
        return self._runtime.grad_norm()

    def abort_step(self) -> None:
        """Drops this window after an exception. Collective where reductions are under way.

        Before the update began nothing has changed: parameters, states and counters are bitwise as before the step.
        """
        self._check_torn()
        self._runtime.abort()

    @property
    def plan(self) -> Plan:
        """Units, flat buffers and slices; printable."""
        return self._runtime.plan

    @property
    def model(self) -> nn.Module:
        return self._runtime.model

    def close(self) -> None:
        """Removes all hooks and makes parameters and the client's optimizer whole and ordinary again. Collective."""
        if self._runtime.closed:
            return
        if self.inner is not None:
            self._guard.remove()
            self._give_back_state(self.inner)
        self._runtime.close()

    def _give_back_state(self, client: torch.optim.Optimizer) -> None:
        mine = {key for piece, _, _ in self._owned for key in client.state.get(piece, {})}
        known = exchange("\n".join(sorted(mine)).encode(), self.group, label="names of states")
        keys = sorted({key for names in known for key in names.decode().split("\n") if key})
        whole: dict[nn.Parameter, dict[str, Tensor]] = {}
        for group in client.param_groups:
            for param in group["params"]:
                if not self._runtime.is_ignored(param):
                    states = {key: self.full_state(param, key) for key in keys} if param.requires_grad else {}
                    whole[param] = {key: value for key, value in states.items() if value is not None}
        for piece, _, _ in self._owned:
            client.state.pop(piece, None)
        client.state.update({param: states for param, states in whole.items() if states})

    # -- by parameter -------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def full_param(self, param: nn.Parameter) -> Tensor:
        """`param`'s master value, whole, in the masters' dtype (fp32 for 16-bit parameters). Collective."""
        flat, _ = self._flat_of(param)
        self._runtime.take_writes([flat])
        source = flat.master if flat.master is not None else flat.shard
        return self._runtime.whole_of(flat, param, source.to(flat.master_dtype))

    @torch.no_grad()
    def set_full_param(self, param: nn.Parameter, value: Tensor) -> None:
        """Sets `param` (master and model value) to `value`, the same on every rank."""
        flat, _ = self._flat_of(param)
        self._runtime.set_value(flat, param, flat.like(param, value))

    @torch.no_grad()
    def full_grad(self, param: nn.Parameter) -> Tensor | None:
        """`param`'s mean gradient over ranks and micro-steps, whole; None where it got none. Collective."""
        flat, index = self._flat_of(param)
        self._reduce()
        if index not in flat.used:
            return None
        if flat.grad is None:
            return None if param.grad is None else param.grad.detach().clone()
        return self._runtime.whole_of(flat, param, flat.grad)

    @torch.no_grad()
    def set_full_grad(self, param: nn.Parameter, value: Tensor) -> None:
        """Replaces `param`'s mean gradient for the coming step, the same on every rank. Collective."""
        flat, index = self._flat_of(param)
        self._reduce()
        value = flat.like(param, value)
        if flat.grad is None and self.group.size == 1 and not flat.sixteen_bit:
            param.grad = value.reshape(param.shape).clone()
        else:
            if flat.grad is None:
                flat.grad = torch.zeros(flat.held_numel, dtype=flat.master_dtype, device=flat.whole.device)
            for held in flat.held_pieces():
                if held.param is param:
                    flat.grad[held.low : held.high].copy_(value[held.piece.start : held.piece.stop])
        flat.used.add(index)

    @torch.no_grad()
    def full_state(self, param: nn.Parameter, key: str) -> Tensor | None:
        """The optimizer state `key` of `param`, whole in its shape (or as it is when not element-wise). Collective.

        None while the state does not exist (before the parameter's first update).
        """
        flat, _ = self._flat_of(param)
        held_state = torch.zeros(flat.held_numel, dtype=flat.master_dtype, device=flat.whole.device)
        scalar: Any = None
        known = False
        for piece, _, held in self._by_param.get(id(param), []):
            value = self.state.get(piece, {}).get(key)
            if isinstance(value, Tensor) and value.numel() == piece.numel() and value.dim() > 0:
                held_state[held.low : held.high].copy_(value.reshape(-1))
                known = True
            elif value is not None:
                scalar = value
        flags = self._runtime.anywhere([known, scalar is not None])
        if flags[0]:
            return self._runtime.whole_of(flat, param, held_state)
        if flags[1]:
            return self._runtime.scalar_anywhere(scalar)
        return None

    @torch.no_grad()
    def set_full_state(self, param: nn.Parameter, key: str, value: Tensor) -> None:
        """Sets the optimizer state `key` of `param` from a whole tensor (or a scalar one), the same on every rank."""
        flat, _ = self._flat_of(param)
        whole = value.numel() == param.numel() and value.dim() > 0
        for piece, _, held in self._by_param.get(id(param), []):
            if whole:
                part = value.reshape(-1)[held.piece.start : held.piece.stop].to(flat.whole.device, flat.master_dtype)
                self.state[piece][key] = part.reshape(piece.shape).clone()
            else:
                self.state[piece][key] = value.clone()

    # -- state of this rank -------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """This rank's part, as the client's optimizer gives it (pieces in the place of parameters)."""
        self._check_torn()
        with self._swapped():
            return self._client("state_dict").state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave on the same rank of the same layout. Ends a torn state."""
        client = self._client("load_state_dict")
        with self._swapped():
            client.load_state_dict(state_dict)
            for group, loaded in zip(self.param_groups, client.param_groups, strict=True):
                group.update(loaded)  # schedulers and users keep the dictionaries they have
            client.param_groups = self.param_groups
        self.state = client.state
        self.torn = False

    def __zs_shardable__(self) -> OptimizerState:
        return OptimizerState(self._runtime, self, self._owned if self.inner is not None else [])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_pieces"):
            raise ConfigError("parameter groups are fixed once a model is sharded: add them before zs_zero.shard")
        super().add_param_group(param_group)

    def __repr__(self) -> str:
        return f"ZeroOptimizer(stage={self.stage}, world={self.group.size}, inner={self.inner!r})"

    # -- inside -------------------------------------------------------------------------------------------------------
    def _make_pieces(self, client: torch.optim.Optimizer) -> list[list[Tensor]]:
        for flat in self._runtime.trainable:
            master = flat.master
            if master is None:
                raise RuntimeError(f"{flat.name}: a trainable flat buffer without a master")
            for held in flat.owned():
                part = master[held.low : held.high]
                if part.numel() == held.param.numel():
                    part = part.view(held.param.shape)  # a client's optimizer may have made state of this shape already
                owned = (part, flat, held)
                self._by_param.setdefault(id(held.param), []).append(owned)
                self._owned.append(owned)
        grouped = []
        for group in client.param_groups:
            pieces: list[Tensor] = []
            for param in group["params"]:
                if self._runtime.is_ignored(param):
                    pieces.append(param)
                    continue
                mine = self._by_param.get(id(param), [])
                state = client.state.pop(param, None)
                for piece, _, held in mine:
                    pieces.append(piece)
                    if state:  # the client's optimizer has stepped before: its state is cut like the parameter
                        client.state[piece] = {key: held.cut(value, piece) for key, value in state.items()}
            grouped.append(pieces)
        return grouped

    def _set_gradients(self) -> None:
        for piece, flat, held in self._owned:
            dropped = flat.grad is None and held.param.grad is None  # by model.zero_grad()
            used = held.piece.index in flat.used and not dropped
            piece.grad = flat.gradient(held).view(piece.shape) if used else None

    def _reduce(self) -> None:
        self._runtime.check_no_backward("step")
        self._runtime.check_frozen()
        self._runtime.reducer.flush()

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        self._swap_in()
        try:
            yield
        finally:
            self._swap_out()

    def _swap_in(self) -> None:
        """Between steps the groups list the model's parameters, as the client made them; in a step, the pieces."""
        self._listed = [group["params"] for group in self.param_groups]
        for group, pieces in zip(self.param_groups, self._pieces, strict=True):
            group["params"] = pieces

    def _swap_out(self) -> None:
        for group, params in zip(self.param_groups, self._listed, strict=True):
            group["params"] = params
        for piece, _, _ in self._owned:
            piece.grad = None

    def _only_from_here(self, *_: Any) -> None:
        if not self._stepping:
            raise ZsError("the model is sharded: call step() of the optimizer that zs_zero.shard returned")

    def _client(self, call: str) -> torch.optim.Optimizer:
        if self.inner is None:
            raise ConfigError(f"{call}() needs an optimizer, and zs_zero.shard was given none")
        return self.inner

    def _flat_of(self, param: nn.Parameter) -> tuple[Flat, int]:
        self._check_torn()
        return self._runtime.flat_of(param)

    def check_usable(self) -> None:
        self._check_torn()
        if self._runtime.closed:
            raise ConfigError("this optimizer was closed: shard the model again")
        self._runtime.check_no_backward("this call")

    def _check_torn(self) -> None:
        if self.torn and not self._stepping:
            raise TornError(
                "the optimizer raised in the middle of its update, so parameters and states are part old, part new; "
                "load a checkpoint (load_state_dict and zs_zero.load_full_state_dict) before going on"
            )
