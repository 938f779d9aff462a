"""`adam`: AdamW on host memory beside torch's, DeepSpeed's, and a C loop with the same reads and writes.

All systems take turns in every round, on the same memory but for DeepSpeed, whose process waits in between. What is
compared is the ratio within a round. Rounds in which a C loop is off its median by over 20 % are discarded.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import IO

import adam_ceiling
import probes
import tables
import torch
from launch import say

PEER = Path(__file__).resolve().parent / "adam_deepspeed.py"
DISTURBED = 0.2  # of the median

# name -> (what it is, bytes per element that must be read and written, the C loop beside it)
SYSTEMS = {
    "loop fused": ("C loop: fp32 gradients, bf16 copy", 30, ""),
    "loop half": ("C loop: bf16 gradients, bf16 copy", 28, ""),
    "loop plain": ("C loop: fp32 gradients", 28, ""),
    "fused": ("zs: fp32 gradients, factor, bf16 copy", 30, "loop fused"),
    "half": ("zs: bf16 gradients, factor, bf16 copy", 28, "loop half"),
    "plain": ("zs: fp32 gradients", 28, "loop plain"),
    "torch sequence": ("torch: grad.mul_, AdamW(fused=True), bf16 copy_", 44, ""),
    "torch plain": ("torch: AdamW(fused=True)", 28, ""),
    "ds sequence": ("DeepSpeed: grad.mul_, CPUAdam.step, bf16 copy_", 44, ""),
    "ds plain": ("DeepSpeed: CPUAdam.step", 28, ""),
}
# system, beside what, at most so many times as long
TARGETS = [
    ("fused", "loop fused", 1 / 0.90),
    ("half", "loop half", 1 / 0.90),
    ("plain", "loop plain", 1 / 0.90),
    ("fused", "torch sequence", 0.75),
    ("half", "torch sequence", 0.60),
    ("plain", "torch plain", 1.00),
    ("fused", "ds sequence", 0.85),
    ("plain", "ds plain", 1.00),
]

Run = Callable[[], float]  # one step; its seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--numel", type=int, default=32 << 20, help="parameters; a multiple of 32")
    parser.add_argument("--threads", default="1,2", help="one or more, separated by commas")
    parser.add_argument("--rounds", type=int, default=25, help="undisturbed ones; at most three times as many are run")
    parser.add_argument("--deepspeed-python", default="", help="an interpreter that has DeepSpeed, if not this one")
    parser.add_argument("--name", default="adam")


def timed(call: Callable[[], object]) -> Run:
    def run() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return run


def local_systems(numel: int, threads: int, loop: adam_ceiling.Loop | None) -> dict[str, Run]:
    """What runs in this process, on one set of arrays."""
    from zs_offload_aio import optim

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(numel))
    grad = param.grad = torch.randn(numel).mul_(0.1)
    half = grad.bfloat16()
    optimizer = torch.optim.AdamW([param], lr=1e-3, weight_decay=0.01, fused=True)
    optimizer.step()  # makes the state
    state = optimizer.state[param]
    p, m, v = param.detach(), state["exp_avg"], state["exp_avg_sq"]
    memory = torch.empty(numel + 32, dtype=torch.bfloat16)
    out = memory[-(memory.data_ptr() // 2) % 32 :][:numel]  # on a line of 64 bytes
    steps = iter(range(2, 1 << 30))

    def zs(gradient: torch.Tensor, copy: torch.Tensor | None) -> Callable[[], None]:
        def step() -> None:  # factor 1 as below: what is multiplied again and again must not shrink
            optim.adamw(p, gradient, m, v, step=next(steps), lr=1e-3, factor=1.0, out=copy, threads=threads)

        return step

    def sequence() -> None:
        grad.mul_(1.0)
        optimizer.step()
        out.copy_(p)

    found = {"fused": zs(grad, out), "half": zs(half, out), "plain": zs(grad, None)}
    calls: dict[str, Callable[[], object]] = {**found, "torch sequence": sequence, "torch plain": optimizer.step}
    if loop is not None:
        calls["loop fused"] = lambda: loop(p, m, v, grad, out, threads)
        calls["loop half"] = lambda: loop(p, m, v, half, out, threads)
        calls["loop plain"] = lambda: loop(p, m, v, grad, None, threads)
    return {name: timed(call) for name, call in calls.items()}


@contextmanager
def peer(python: str, numel: int, threads: int) -> Iterator[dict[str, Run] | str]:
    """DeepSpeed's process and its two systems, or why there are none."""
    if not python:
        yield "not there; name an interpreter that has it with --deepspeed-python"
        return
    path = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])  # it compiles by the ninja there
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PATH": path}
    errors = None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL
    command = [python, str(PEER), str(numel), str(threads)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
    )
    writer, reader = _pipes(process)

    def ask(question: str) -> Run:
        def run() -> float:
            writer.write(question + "\n")
            writer.flush()
            return float(reader.readline())

        return run

    try:
        if reader.readline().strip() == "ready":
            yield {"ds sequence": ask("sequence"), "ds plain": ask("plain")}
        else:
            yield f"{python} does not run it (BENCH_VERBOSE=1 shows why)"
    finally:
        writer.close()
        process.wait(60)


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process has no pipes")
    return process.stdin, process.stdout


def measure(systems: dict[str, Run], rounds: int) -> list[dict[str, float]]:
    """Seconds by system until `rounds` are undisturbed, in three times as many at most; each begins a system later."""
    names = list(systems)
    for name in names:
        systems[name]()
    found: list[dict[str, float]] = []
    while len(found) < 3 * rounds and (len(found) < rounds or len(undisturbed(found)) < rounds):
        begin = len(found) % len(names)
        found.append({name: systems[name]() for name in names[begin:] + names[:begin]})
    return found


def undisturbed(rounds: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without the rounds in which a C loop is off its median by over a fifth."""
    loops = [name for name in rounds[0] if name.startswith("loop")]
    middle = {name: median(found[name] for found in rounds) for name in loops}
    return [r for r in rounds if all(abs(r[name] / middle[name] - 1) <= DISTURBED for name in loops)]


def section(threads: int, numel: int, every: list[dict[str, float]]) -> str:
    kept = undisturbed(every)
    if not kept:
        return f"## {threads} threads\n\nAll {len(every)} rounds were disturbed.\n"
    rows = []
    for name, (what, nbytes, loop) in SYSTEMS.items():
        if name not in kept[0]:
            continue
        rate = [nbytes * numel / r[name] / 1e9 for r in kept]
        share = tables.spread([r[loop] / r[name] for r in kept], 2) if loop in kept[0] else "-"
        rows.append([what, tables.spread([r[name] for r in kept], 1, 1e3), tables.spread(rate, 1), share])
    goals = []
    for name, beside, limit in TARGETS:
        what = f"{SYSTEMS[name][0]} / {SYSTEMS[beside][0]}"
        if beside not in kept[0]:
            goals.append([what, f"{limit:.2f}", "-", "not measured"])
            continue
        ratios = [r[name] / r[beside] for r in kept]
        goals.append([what, f"{limit:.2f}", tables.spread(ratios), "met" if median(ratios) <= limit else "missed"])
    return f"""## {threads} thread{"s" if threads > 1 else ""}

{len(kept)} rounds; {len(every) - len(kept)} more were discarded.

{tables.table(["system", "ms", "GB/s", "of the C loop's rate"], rows)}

{tables.table(["time of / time of", "at most", "measured", ""], goals)}
"""


def main(args: argparse.Namespace) -> int:
    if args.numel <= 0 or args.numel % 32:
        raise SystemExit(f"--numel must be a multiple of 32: {args.numel}")
    machine = probes.hardware()
    python = args.deepspeed_python or (sys.executable if importlib.util.find_spec("deepspeed") else "")
    from zs_offload_aio import optim

    notes, sections = [], []
    with tempfile.TemporaryDirectory() as folder:
        loop = adam_ceiling.build(Path(folder))
        if isinstance(loop, str):
            notes.append(f"The C loop was not measured: {loop}.")
        for threads in map(int, args.threads.split(",")):
            with peer(python, args.numel, threads) as found:
                systems = local_systems(args.numel, threads, None if isinstance(loop, str) else loop)
                if isinstance(found, str):
                    notes.append(f"DeepSpeed was not measured: {found}.")
                else:
                    systems |= found
                say(f"{threads} threads: {args.rounds} rounds of {len(systems)} systems")
                sections.append(section(threads, args.numel, measure(systems, args.rounds)))
    text = f"""# AdamW on host memory

{machine}; instruction set {optim.isa()}.

{args.numel / 1e6:.1f} million parameters, fp32 masters and moments. Figures are medians (least-most). GB/s count what \
must be read and written once: p, m, v and g read, p, m, v and the copy written; for the sequences, what their three \
passes do. All systems take turns in each round; ratios are within a round; rounds in which a C loop is off its median \
by over {DISTURBED:.0%} are discarded.{"".join(f" {note}" for note in dict.fromkeys(notes))}

{chr(10).join(sections)}"""
    print(text)
    say(f"written: {tables.save(args.name, text)}")
    return 0
