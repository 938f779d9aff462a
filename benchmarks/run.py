"""The project's benchmarks:  python benchmarks/run.py JOB [options], JOB one of

    train | wire | memory | import | adam | aio | ckpt | overhead | offload | infinity

Each prints Markdown and writes it to benchmarks/results. `--help` after a name lists its options.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))  # the model is the examples' own

JOBS = {  # name on the command line -> module
    "train": "train",
    "wire": "wire",
    "memory": "memory",
    "import": "startup",
    "adam": "adam",
    "aio": "aio",
    "ckpt": "ckpt",
    "overhead": "overhead",
    "offload": "offload",
    "infinity": "infinity",
}


def work(job: str, task: str, folder: str) -> None:
    """One rank of one measurement; `launch.launch` starts this under torchrun."""
    import launch
    import probes
    import torch.distributed as dist

    record = import_module(JOBS[job]).worker(json.loads(task))
    launch.report(folder, probes.rank(), record)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def main() -> int:
    if sys.argv[1:2] == ["worker"]:
        work(*sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="job", required=True)
    for name, module in JOBS.items():
        job = import_module(module)
        summary = (job.__doc__ or "").splitlines()[0]
        job.add_arguments(commands.add_parser(name, help=summary, description=summary))
    args = parser.parse_args()
    result: int = import_module(JOBS[args.job]).main(args)
    return result


if __name__ == "__main__":
    sys.exit(main())
