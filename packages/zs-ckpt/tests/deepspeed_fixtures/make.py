"""Writes the checkpoints of this folder with DeepSpeed 0.19.8, two gloo ranks on the CPU:

    python make.py        (in an environment with deepspeed)

For each case: SEEN steps, `save_checkpoint`, then NEXT steps more, whose losses and rates go to `expected.json`. The
universal ones are DeepSpeed's own conversion of two of them.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import tiny  # noqa: E402

SOURCES = {"universal_fp32": "zero1_fp32", "universal_bf16": "zero3_bf16"}


def train_all() -> None:
    """One rank of every case."""
    import deepspeed
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    for case in tiny.CASES:
        train(case, HERE / case)
    dist.barrier()
    dist.destroy_process_group()


def train(case: str, folder: Path) -> None:
    import deepspeed
    import torch.distributed as dist

    stage, dtype = int(case[4]), case[6:]
    config = tiny.config(stage, dtype)
    config["optimizer"]["params"]["torch_adam"] = True  # torch's AdamW, not a compiled one: the same bits everywhere
    model = tiny.Tiny()
    engine = deepspeed.initialize(model=model, model_parameters=tiny.groups(model), config=config)[0]
    losses, lrs = [], []
    for step in range(tiny.SEEN + tiny.NEXT):
        if step == tiny.SEEN:
            engine.save_checkpoint(str(folder), tag=f"global_step{step}", client_state=copy.deepcopy(tiny.CLIENT_STATE))
        lrs.append(engine.get_lr()[0])
        loss = engine(*tiny.batch(step, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        losses.append(mean.item() / tiny.RANKS)
    if dist.get_rank() == 0:
        found = {"losses": losses[tiny.SEEN :], "lrs": lrs[tiny.SEEN :], "first_losses": losses[: tiny.SEEN]}
        Path(folder, "losses.json").write_text(json.dumps(found))


def run(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def main() -> None:
    expected: dict[str, Any] = {}
    for case in tiny.CASES:
        shutil.rmtree(HERE / case, ignore_errors=True)
    run("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tiny.RANKS}", __file__, "rank")
    for case in tiny.CASES:
        folder = HERE / case
        for script in folder.glob("*.py"):  # DeepSpeed's converters, no data
            script.unlink()
        expected[case] = json.loads((folder / "losses.json").read_text())
        (folder / "losses.json").unlink()
    for case, source in SOURCES.items():
        folder, tag = HERE / case, f"global_step{tiny.SEEN}"
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as scratch:
            given = shutil.copytree(HERE / source, Path(scratch, "in")) / tag
            run("-m", "deepspeed.checkpoint.ds_to_universal", f"--input_folder={given}",
                f"--output_folder={folder / tag}", "--inject_missing_state", "--num_extract_workers=1",
                "--num_merge_workers=1")  # fmt: skip
        (folder / "latest_universal").write_text(tag)
        expected[case] = expected[source]
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    train_all() if sys.argv[1:] == ["rank"] else main()
