"""DeepSpeed's CPUAdam, timed on request:  PYTHON adam_deepspeed.py NUMEL THREADS

A process of an interpreter that has DeepSpeed. It prints "ready", then answers each line "sequence" (what its offload
does: grad.mul_, step, bf16 copy_) or "plain" (the step alone) with the seconds that it took.
"""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout


def main() -> None:
    numel, threads = int(sys.argv[1]), int(sys.argv[2])
    with redirect_stdout(sys.stderr):  # it logs to stdout
        import torch
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(numel))
        param.grad = torch.randn(numel).mul_(0.1)
        out = torch.empty(numel, dtype=torch.bfloat16)
        optimizer = DeepSpeedCPUAdam([param], lr=1e-3, weight_decay=0.01, adamw_mode=True)
        for _ in range(2):
            optimizer.step()
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        if line.strip() == "sequence":
            param.grad.mul_(1.0)
            optimizer.step()
            with torch.no_grad():
                out.copy_(param)
        else:
            optimizer.step()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
