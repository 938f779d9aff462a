"""Optimizer states and parameters in files, with the numbers of the run in memory; no engine, no JSON.

    $ python examples/offload.py                          # in a temporary folder: name one on a fast disk by --folder
    $ python examples/offload.py --in-memory              # the same hash at the end
    $ torchrun --nproc-per-node 2 examples/offload.py     # each rank has files of its own

Needs zs-zero. Plain files do; with zs-offload-aio beside it (`pip install 'zs-zero[nvme]'`) they are read and written
around the page cache, several at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from typing import Any

import torch
import zs_comm
import zs_zero
from torch import nn


def weights_hash(model: nn.Module) -> str:
    """Of the whole values, on every rank."""
    digest = hashlib.sha256()
    for name, value in zs_zero.full_state_dict(model).items():
        digest.update(name.encode())
        digest.update(bytes(value.flatten().view(torch.uint8).tolist()))
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", help="where the files go (default: a temporary folder)")
    parser.add_argument("--store", default="auto", choices=["auto", "aio", "file"], help="what moves the blocks")
    parser.add_argument("--in-memory", action="store_true", help="no files, for comparison")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    group = zs_comm.init_distributed()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128)) for _ in range(4)))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)

    with tempfile.TemporaryDirectory() as temporary:
        options: dict[str, Any] = {}
        if not args.in_memory:
            files = {"device": "nvme", "nvme_path": args.folder or temporary}
            options = {
                "offload_optimizer": files,  # Adam's moments; fp32 masters too where there are any
                "offload_param": {**files, "max_in_cpu": 0},  # no parameter stays in memory between its uses
                "aio": {"zs_store": args.store},
            }
        optimizer = zs_zero.shard(model, adamw, stage=3, **options)
        data = torch.Generator().manual_seed(group.rank)
        for _ in range(args.steps):
            x = torch.randn(32, 128, generator=data)
            loss = (model(x) - x.flip(1)).square().mean()
            loss.backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        found = weights_hash(model)
        if group.rank == 0:
            if not args.in_memory:
                print(optimizer.offload_report())
            print(f"loss {loss.item():.4f}")
            print(f"weights {found}")
        optimizer.close()  # the files are removed
    zs_comm.shutdown()


if __name__ == "__main__":
    main()
