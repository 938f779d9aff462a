"""The optimizer that `zs_zero.shard` returns: the client's own, run on this rank's pieces.

Order of a step, the same for every stage and precision:

    finish reduction -> overflow and norm -> skip, or unscale and clip -> client's optimizer on the pieces
        -> write back -> gather (stages 1, 2) or release (3) -> update the loss scale
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from zs_comm import ConfigError, ZsError, agree

from .access import ParameterAccess
from .flat import Flat
from .flat_pieces import HeldPiece
from .offload_states import StatesOffload
from .optimizer_state import OptimizerState, whole_states
from .placement import PieceSums
from .plan import Plan
from .scaled_loss import ScaledLoss
from .settings import Settings
from .sharded import ShardedOptimizer, TornError
from .tiered import TieredStep
from .wide import WideStep

if TYPE_CHECKING:
    from .runtime import Runtime


class ZeroOptimizer(ScaledLoss, TieredStep, ParameterAccess, StatesOffload, ShardedOptimizer):
    """The client's optimizer over sharded state. `step()` ends an accumulation window.

    `param_groups` are the client's own dictionaries, so learning rates set on either object count for both, and a
    scheduler may hold either. Gradients are consumed by `step()`. Those of an open window carry the loss scale; what is
    read and written by parameter, and the norm, do not.

    Attributes:
        overflow: whether the last `step()` was skipped because of gradients that are not finite.
        norm: the global norm in the last `step()`, before it clipped (0-dim fp32, CPU); None where it needed none.
    """

    def __init__(self, runtime: "Runtime", client: torch.optim.Optimizer | None) -> None:
        self._runtime = runtime
        runtime.access = self
        self.inner = client
        self.stage = runtime.stage
        self.group = runtime.groups.dp
        self.torn = False
        self.overflow = False
        self.norm: Tensor | None = None
        self._stepping = self._coalescing = False
        self._tiers = runtime.tiers
        groups = client.param_groups if client is not None else [{"params": list(runtime.model.parameters())}]
        super().__init__(groups, dict(client.defaults) if client is not None else {})
        if client is None:
            self._pieces: list[list[Tensor]] = []
            return
        self.param_groups = client.param_groups
        self.state = client.state
        self._owned: list[tuple[Tensor, Flat, HeldPiece]] = []
        self._by_param: dict[int, list[tuple[Tensor, Flat, HeldPiece]]] = {}
        self._placement = runtime.placement
        self._pieces = self._make_pieces(client)
        self._settings = Settings(client.param_groups, runtime.is_ignored)
        self.wide = WideStep(client, self._owned, runtime.options.precision.seed)
        if hasattr(client, "sum_pieces") and not runtime.whole_state:
            client.sum_pieces = PieceSums(self._owned, runtime.trainable, runtime.groups.shard)
        if self._tiers is not None and runtime.options.by_blocks:
            pairs = [(group, [*pieces]) for group, pieces in zip(client.param_groups, self._pieces, strict=True)]
            runtime.reducer.on_arrival = self._arrived if self._tiers.early else None
            self._tiers.own(client, self._owned, pairs, seed=runtime.options.precision.seed)
        self._guard = client.register_step_pre_hook(self._only_from_here)

    # -- the user's loop ----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, max_norm: float | None = None) -> Any:
        """Ends the window: reduces what is not reduced, updates this rank's pieces, spreads the new values.

        Gradients are divided by the loss scale that they were made with, and clipped where `max_norm` is given (as
        `clip_grad_norm_` does; infinity only computes `norm`). With a loss scale, gradients that are not finite on any
        rank skip the step: `overflow` is True then, the window is dropped, and nothing else changes but the scale.

        A parameter without a gradient on any rank is left alone, as in torch. On an error before the update began,
        parameters and states are as before and `abort_step()` clears the window; after that the optimizer is `torn`.

        Raises:
            TornError: after an update that failed half-way.
            LossScaleError: for a skipped step, where the loss scale was asked to say so. `overflow` is True.
            RankDisagreement: the groups' hyper-parameters (lr, betas, ...) are not the same on all ranks.
            ZsError: when the last backward raised, or another rank's update failed (RankDisagreement).
        """
        self.check_usable()
        self._runtime.check_not_borrowed("step()")
        client, began = self._client("step"), time.perf_counter()
        loss = None
        if closure is not None:
            if self._tiers is not None and self._tiers.block_step is not None:
                raise ConfigError("step(closure) evaluates many gradients, and an offloaded optimizer takes one")
            if not self._runtime.whole_state or self.wide:
                raise ConfigError("step(closure) needs whole parameters, with states in their dtype: stage 0")
            if self._runtime.scaling.checks or max_norm is not None:
                raise ConfigError("step(closure) evaluates many gradients, and takes neither loss_scale nor max_norm")
            inner_closure = closure

            def closure() -> Any:
                with torch.enable_grad():
                    value = inner_closure()
                self._reduce()
                self._set_gradients()
                return value

        else:
            self._reduce("" if self.group.size == 1 else str(self._settings))
            self.norm, taken = self._runtime.gradients.decide(max_norm, self._runtime.drop_gradients)
            self.overflow = not taken
            if not taken:
                self._runtime.scaling.update(overflow=True)
                return None
            self._runtime.take_writes(self._runtime.flats)
            if self._tiers is not None and self._tiers.block_step is not None:
                return self._step_in_tiers(self._tiers)
            self._set_gradients()
        self._stepping = self.torn = True
        error: Exception | None = None
        self._swap_in()
        try:
            if self.wide:
                self.wide(self._gradient_of)
            else:
                loss = client.step(closure) if closure is not None else client.step()
        except Exception as raised:
            error = raised
        finally:
            self._swap_out()
            self._stepping = False
        agree(self.group, error, what="optimizer step")
        self._placement.give_back()
        self._runtime.after_update()
        self.torn = False
        self._runtime.scaling.update(overflow=False)
        if self._tiers is not None:
            self._tiers.stepped(time.perf_counter() - began)
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

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Backwards inside keep whole local gradients, and the end reduces their sum once. Collective.

        Stages 2 and 3 reduce after every backward otherwise. `step()` comes after the block, which may be repeated; an
        exception inside leaves the gradients local.

        Raises:
            ConfigError: inside of itself or of `no_sync`, and for `step()` or a norm inside.
        """
        self.check_usable()
        if not self._runtime.sync:
            raise ConfigError("coalesce_grad_reduction() inside of itself or of no_sync(): one of them is enough")
        self._coalescing = True
        try:
            with self.no_sync():
                yield
        finally:
            self._coalescing = False
        with torch.no_grad():
            self._reduce()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Reduces, then scales all gradients by `min(1, max_norm / (norm + 1e-6))`, as torch's function does.

        Call it on every rank between backward and step, in the place of torch's (which sees this rank's gradients only,
        and raises at stage 3). Returns the norm before clipping (0-dim fp32, CPU).
        """
        norm = self.grad_norm()
        self._runtime.gradients.clip_(norm, max_norm)
        return norm

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The global 2-norm of the window's mean gradient (0-dim fp32, CPU). Collective."""
        self.check_usable()
        self._reduce()
        return self._runtime.gradients.norm()

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

    def close(self, *, states: bool = True, parameters: bool = True) -> None:
        """Removes all hooks and makes parameters and the client's optimizer whole and ordinary again. Collective.

        An open window is dropped, and with it every buffer; after that this object refuses every call.

        Args:
            states: False drops the optimizer's states (as happens to those of a torn optimizer), and gathers none.
            parameters: False gathers nothing at all and is local, so that a rank may call it after an error: at stage 3
                the parameters' values are gone then.
        """
        if self._runtime.closed:
            return
        self._runtime.offloaded.reload(non_blocking=False)
        if parameters:
            self._runtime.abort()
        if self.inner is not None:
            self._guard.remove()
            if states and parameters and not self.torn:
                pieces = [piece for piece, _, _ in self._owned]
                self.inner.state.update(whole_states(self, self.inner, self._runtime, pieces))
            for piece, _, _ in self._owned:
                self.inner.state.pop(piece, None)
            self._owned, self._by_param, self._pieces = [], {}, []
            client: Any = self.inner
            if isinstance(getattr(client, "sum_pieces", None), PieceSums):
                client.sum_pieces = None
        self._runtime.close(gather=parameters)

    # -- state of this rank -------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """This rank's part, as the client's optimizer gives it (pieces for parameters); and `loss_scale`, if any."""
        self._check_torn()
        self._settle()
        with self._swapped():
            state = self._client("state_dict").state_dict()
        if self._tiers is not None:
            state["state"] = self._with_files(state["state"])
        scale = self._runtime.scaling.state_dict()
        return state | ({"loss_scale": scale} if scale else {}) | ({"updates": self.wide.updates} if self.wide else {})

    def _with_files(self, states: dict[int, Any]) -> dict[int, Any]:
        """States as the client's `state_dict` gives them, with copies of what is in files."""
        pieces = [piece for pieces in self._pieces for piece in pieces]
        owned = {id(one[0]): one for one in self._owned}
        found = {}
        for number, state in states.items():
            one = owned.get(id(pieces[number]))
            found[number] = state if one is None else {key: self._state_of(one, key) for key in state}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave on the same rank of the same layout. Ends a torn state."""
        client = self._client("load_state_dict")
        self._settle()
        own = {key: value for key, value in state_dict.items() if key not in ("loss_scale", "updates")}
        self.torn = True  # until all of it is there
        with self._swapped(), self.wide.as_states():
            client.load_state_dict(own)
            for group, loaded in zip(self.param_groups, client.param_groups, strict=True):
                group.update(loaded)  # schedulers and users keep the dictionaries they have
            client.param_groups = self.param_groups
        self.state = client.state
        if self._tiers is not None:
            self._tiers.take_states(client, self._owned)
        self._runtime.scaling.load_state_dict(state_dict.get("loss_scale", {}))
        self.wide.updates = state_dict.get("updates", 0)
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
            for held in flat.owned():
                if self._placement.owner(held.param) is not None:
                    continue
                part = flat.master_of(held)
                if part.numel() == held.param.numel():
                    part = part.view(held.param.shape)  # a client's optimizer may have made state of this shape already
                owned = (part, flat, held)
                self._by_param.setdefault(id(held.param), []).append(owned)
                self._owned.append(owned)
        for owned in self._placement.pieces():
            self._by_param[id(owned[2].param)] = [owned]
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
                        flat.keep_state(client.state[piece], piece)
            grouped.append(pieces)
        return grouped

    def _set_gradients(self) -> None:
        self._placement.bring()
        for piece, flat, held in self._owned:
            if not flat.kept.widened:
                grad = self._gradient_of(flat, held)
                if grad is not None:
                    if grad.dim() != piece.dim():  # 1-d, or shaped as the parameter; a test is cheaper than a view
                        grad = grad.view_as(piece)
                    if grad.dtype != piece.dtype:
                        grad = grad.to(piece.dtype)
                piece.grad = grad

    def _gradient_of(self, flat: Flat, held: HeldPiece) -> Tensor | None:
        dropped = flat.grad is None and held.param.grad is None  # by model.zero_grad()
        return None if dropped or held.piece.index not in flat.used else flat.gradient(held)

    def _reduce(self, settings: str = "") -> None:
        if self._coalescing:
            raise ConfigError("gradients are local inside coalesce_grad_reduction(): call this after it")
        self._runtime.check_no_backward("step")
        self._runtime.check_frozen()
        self._runtime.scaling.check_window()
        self._runtime.reducer.flush(settings)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        self._swap_in()
        try:
            yield
        finally:
            self._swap_out()

    def _swap_in(self) -> None:
        """Between steps the groups list the model's parameters, as the client made them; in a step, the pieces."""
        self._runtime.offloaded.check()
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

    def check_usable(self) -> None:
        self._check_torn()
        if self._runtime.closed:
            raise ConfigError("this optimizer was closed: shard the model again")
        self._runtime.check_no_backward("this call")
        self._runtime.offloaded.check()

    def _check_torn(self) -> None:
        if self.torn and not self._stepping:
            raise TornError(
                "the optimizer raised in the middle of its update, so parameters and states are part old, part new; "
                "load a checkpoint (load_state_dict and zs_zero.load_full_state_dict) before going on"
            )
