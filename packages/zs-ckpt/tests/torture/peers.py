"""The same kills for other ways to save a checkpoint: their figures beside ours.

    python peers.py --runs 300                                  every peer that this interpreter can import, and zs
    python peers.py --runs 300 --deepspeed-python PATH          DeepSpeed in an interpreter that has it

Each is used as its documentation shows, on the same states. "torn": a load that raised something, or gave the bits of
no one step; "lost": nothing was found where something had been committed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "torture"

import torch
from torch import Tensor

from .states import Torn, check, expected
from .systems import Nothing, Scenario

SAME = Scenario("same tag, shorter after longer")
NEW = Scenario("new tag", tag="step{step}")


class _Peer:
    name = ""
    commit = ""
    scenarios = [SAME]

    def prepare(self) -> None:
        """Nothing to set up."""

    def valid(self, folder: Path) -> int:
        return 0

    def leftovers(self, folder: Path) -> list[str]:
        """Not held against a peer: none promises to collect any."""
        return []


def _state(step: int, scenario: Scenario) -> dict[str, Any]:
    return {**expected(step, scenario.long(step)), "step": step}


def _checked(state: dict[str, Any]) -> int:
    step = state.pop("step")
    check(step, state)
    return int(step)


class TorchSave(_Peer):
    """`torch.save(state, path)`: the tutorial's way."""

    name = "torch.save"

    def save(self, folder: Path, step: int, scenario: Scenario, group: Any = None) -> None:
        torch.save(_state(step, scenario), folder / "checkpoint.pt")

    def load(self, folder: Path) -> int:
        if not (folder / "checkpoint.pt").exists():
            raise Nothing(str(folder))
        return _checked(torch.load(folder / "checkpoint.pt", weights_only=True))


class TorchSaveRenamed(TorchSave):
    """To a temporary name, synced, then renamed: the careful user's way."""

    name = "torch.save, renamed"
    commit = "checkpoint.pt"
    synced = True

    def save(self, folder: Path, step: int, scenario: Scenario, group: Any = None) -> None:
        with open(folder / "checkpoint.tmp", "wb") as file:
            torch.save(_state(step, scenario), file)
            file.flush()
            if self.synced:
                os.fsync(file.fileno())
        os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


class TorchSaveNotSynced(TorchSaveRenamed):
    """Renamed without a sync: safe from kills, not from power cuts."""

    name = "torch.save, renamed, not synced"
    synced = False


class Dcp(_Peer):
    """`torch.distributed.checkpoint.save`; of several folders the newest that has its `.metadata` is loaded."""

    name = "dcp"
    scenarios = [SAME, NEW]

    def __init__(self) -> None:
        import torch.distributed.checkpoint as dcp

        self.dcp = dcp
        warnings.simplefilter("ignore")  # about one process, and about overwriting: both are wanted

    def save(self, folder: Path, step: int, scenario: Scenario, group: Any = None) -> None:
        place = folder / scenario.tag.format(step=f"{step:06}")
        self.dcp.save(_state(step, scenario), checkpoint_id=str(place), no_dist=True)

    def load(self, folder: Path) -> int:
        found = sorted(path.parent for path in folder.glob("*/.metadata"))
        if not found:
            raise Nothing(str(folder))
        metadata = self.dcp.FileSystemReader(str(found[-1])).read_metadata().state_dict_metadata
        state: dict[str, Any] = {"step": -1}
        for name, of_one in metadata.items():
            if name != "step":
                state[name] = torch.empty(of_one.size, dtype=of_one.properties.dtype)
        self.dcp.load(state, checkpoint_id=str(found[-1]), no_dist=True)
        return _checked(state)


class DeepSpeed(_Peer):
    """`engine.save_checkpoint`, ZeRO stage 1 on one rank, the same tag or a new one; `latest` says which is loaded."""

    name = "deepspeed"
    scenarios = [SAME, NEW]

    def __init__(self) -> None:
        """The engine is made before any fork, its making is not what is tortured; a barrier of one rank needs no
        thread, which no fork has."""
        import socket

        import deepspeed

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
        config = {
            "train_batch_size": 1,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
            "checkpoint": {"tag_validation": "Ignore"},
        }
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512))
        self.engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        for module in (deepspeed.comm, torch.distributed):
            module.barrier = lambda *_, **__: None

    def _fill(self, step: int) -> None:
        with torch.no_grad():
            for part in self._parts():
                part.fill_(float(step))

    def _parts(self) -> list[Tensor]:
        return [*self.engine.module.parameters(), *self.engine.optimizer.single_partition_of_fp32_groups]

    def save(self, folder: Path, step: int, scenario: Scenario, group: Any = None) -> None:
        self._fill(step)
        self.engine.save_checkpoint(str(folder), tag=scenario.tag.format(step=step), client_state={"saved": step})

    def load(self, folder: Path) -> int:
        self._fill(0)
        path, client = self.engine.load_checkpoint(str(folder))
        if path is None:
            raise Nothing(str(folder))
        step = int(client["saved"])
        if not all(bool((part == float(step)).all()) for part in self._parts()):
            raise Torn(f"client state of step {step}, parameters of another")
        return step


SYSTEMS: dict[str, Callable[[], Any]] = {
    made.name: made for made in (TorchSave, TorchSaveRenamed, TorchSaveNotSynced, Dcp, DeepSpeed)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300, help="killed runs of each system (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deepspeed-python", default=sys.executable)
    parser.add_argument("--only", default="", help="names, by comma")
    args = parser.parse_args()
    for name in args.only.split(",") if args.only else ["zs", *SYSTEMS]:
        python = args.deepspeed_python if name == "deepspeed" else sys.executable
        environment = dict(os.environ)
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        command = [python, "-P", str(Path(__file__).with_name("drive.py")), "kills", "--system", name]
        command += ["--runs", str(args.runs), "--jobs", str(args.jobs), "--seed", str(args.seed), "--brief"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        said = done.stdout.strip() or (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"{said}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
