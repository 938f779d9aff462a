"""DeepSpeed's side of the `ckpt` benchmark, in an environment that has it.

The first line on stdin has the parameters' shapes by name, each later one {"folder"}: a checkpoint is saved there and
synced, and {"seconds"} is the answer on stdout.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from time import perf_counter
from typing import Any


def sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def make_engine(shapes: dict[str, list[int]]) -> Any:
    """ZeRO stage 1 on one rank, fp32, with Adam's moments there after one step."""
    import deepspeed
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parameters = {
                name.replace(".", "_"): torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()
            }
            self.all = torch.nn.ParameterDict(parameters)

        def forward(self) -> torch.Tensor:
            return torch.stack([parameter.sum() for parameter in self.all.values()]).sum()

    model = Model()
    config = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
    }
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    engine.backward(engine())
    engine.step()
    return engine


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to stderr
    engine = make_engine(json.loads(sys.stdin.readline()))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        folder = Path(json.loads(line)["folder"])
        began = perf_counter()
        engine.save_checkpoint(str(folder), tag="checkpoint")
        sync(folder)
        print(json.dumps({"seconds": perf_counter() - began}), file=answers, flush=True)


if __name__ == "__main__":
    main()
