"""Train a small GPT on real text from a DeepSpeed configuration, over any number of ranks.

    zs run -n 2 examples/train_gpt.py                                       # stage 3, fp32, the Python reference
    zs run -n 2 examples/train_gpt.py --config examples/zero3_bf16.json --text my_book.txt
    python examples/train_gpt.py --steps 30                                 # one process, a quick look
    zs run -n 2 examples/train_gpt.py --save runs/gpt --resume              # goes on where it stopped, on any ranks

The JSON says the stage, the precision, the batch and the optimizer; the loop below is the same for all of them, on CPU
and on a GPU. With the same seed and batch, every number of ranks sees the same data in the same order.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zs_comm
import zs_engine
from corpus import Corpus, read_text
from gpt import GPT, GPTConfig, generate
from torch import Tensor
from zs_comm.jsonfile import read_json
from zs_comm.memory import live_tensor_nbytes, memory_summary

HERE = Path(__file__).resolve().parent
REPORT_EVERY = 10  # steps between two readings of the loss: each makes the host wait for the device
LINE_EVERY = 100  # steps between two lines when there is no terminal


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=HERE / "zero3.json", help="DeepSpeed-shaped JSON")
    parser.add_argument("--text", type=Path, help="a file or folder (default: the Python language reference)")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--context", type=int, default=64, help="bytes that the model looks back on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="folder for checkpoints: every --save-every steps, and at the end")
    parser.add_argument("--save-every", type=int, default=200, help="steps between two checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --save, if any")
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--sample", type=int, default=300, help="bytes of text to generate at the end")
    parser.add_argument("--temperature", type=float, default=0.6, help="of the sample; 0 takes the likeliest byte")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    args = parser.parse_args()
    if args.resume and args.save is None:
        parser.error("--resume needs --save: the folder with the checkpoints")
    return args


def load_config(path: Path, steps: int) -> dict[str, Any]:
    """The configuration, with the length of its learning-rate schedule filled in where it says "auto"."""
    config, _ = read_json(path)
    schedule = config.get("scheduler", {}).get("params", {})
    if schedule.get("total_num_steps") == "auto":
        schedule["total_num_steps"] = max(steps, schedule.get("warmup_num_steps", 0) + 1)
    return config


@dataclass
class Trained:
    """What a run came to."""

    loss: float  # over the last steps and all ranks
    tokens_per_s: float  # over all ranks, the first steps left out
    state_nbytes: int  # parameters, gradients and optimizer state on this rank, when all three exist


def train(
    engine: Any, corpus: Corpus, *, steps: int, group: zs_comm.Group, held_before: int, save: Path | None, every: int,
    recent: deque[Tensor],
) -> Trained:  # fmt: skip
    """Trains up to `steps` optimizer steps; progress on rank 0.

    `held_before`: bytes of tensors that are not the model's. `save`: where a checkpoint goes `every` so many steps.
    `recent`: losses of the last steps, also of those before a resume.
    """
    micro_batch = engine.train_micro_batch_size_per_gpu()
    accumulation = engine.gradient_accumulation_steps()
    tokens_per_step = engine.train_batch_size() * corpus.context
    progress = Progress(steps, shown=group.rank == 0)
    first_step = engine.global_steps
    warmup = first_step + min(10, (steps - first_step) // 2)
    state_nbytes, began = 0, time.perf_counter()

    for step in range(first_step, steps):
        if step == warmup:
            began = time.perf_counter()
        ids, targets = corpus.training_batch(step, engine.train_batch_size())
        losses = []
        for micro in range(accumulation):
            first = (micro * group.size + group.rank) * micro_batch
            mine = slice(first, first + micro_batch)
            loss = engine(ids[mine].to(engine.device), targets[mine].to(engine.device))
            engine.backward(loss)
            losses.append(loss.detach())
            del loss  # it holds the step's graph
            if step == steps - 1 and engine.is_gradient_accumulation_boundary():
                state_nbytes = live_tensor_nbytes(engine.device.type) - held_before
            engine.step()
        recent.append(torch.stack(losses).float().mean())
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            mean = torch.stack(list(recent)[-REPORT_EVERY:]).mean().item()  # waits for the device
            speed = (step + 1 - warmup) * tokens_per_step / (time.perf_counter() - began) if step >= warmup else 0.0
            progress.report(step + 1, loss=mean, tokens_per_s=speed)
        if save is not None and ((step + 1) % every == 0 or step + 1 == steps):
            losses_so_far = [loss.item() for loss in recent]
            engine.save_checkpoint(save, client_state={"recent": losses_so_far}, asynchronous=step + 1 < steps)
    progress.close()

    loss = zs_comm.all_reduce(torch.stack(list(recent)).mean(), group)
    seconds = time.perf_counter() - began
    return Trained(loss.item(), (steps - warmup) * tokens_per_step / seconds, state_nbytes)


@torch.no_grad()
def evaluate(engine: Any, corpus: Corpus, batch_size: int) -> float:
    """Mean loss over the held-out text. Every rank evaluates all of it: it is short, and all get the same figure."""
    engine.eval()
    batches = corpus.validation_batches(batch_size)
    losses = [engine(ids.to(engine.device), targets.to(engine.device)).float() for ids, targets in batches]
    engine.train()
    return torch.stack(losses).mean().item()


def write_sample(engine: Any, args: argparse.Namespace) -> str:
    """A continuation of the prompt. At stage 3 each byte gathers the parameters, so every rank takes part."""
    engine.eval()
    prompt = torch.tensor(list(args.prompt.encode()), device=engine.device)
    ids = generate(engine, prompt, args.sample, context=args.context, temperature=args.temperature, seed=args.seed)
    return bytes(ids.tolist()).decode(errors="replace")


def unsharded_nbytes(model: torch.nn.Module, config: dict[str, Any]) -> int:
    """Parameters, gradients and AdamW's state where nothing is sharded: 16 bytes per parameter either way."""
    if config.get("bf16", {}).get("enabled"):
        per_parameter = 2 + 2 + (4 + 4 + 4)  # weight, gradient; fp32 master and two moments
    else:
        per_parameter = 4 + 4 + (4 + 4)
    return per_parameter * sum(p.numel() for p in model.parameters())


class Progress:
    """A bar with loss, speed and memory on a terminal; a line every hundred steps elsewhere; nothing on other ranks."""

    def __init__(self, steps: int, *, shown: bool) -> None:
        self.steps = steps
        self.shown = shown
        self.memory = ""
        self.bar: Any = None
        if shown and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=steps, unit="step", dynamic_ncols=True)

    def report(self, step: int, *, loss: float, tokens_per_s: float) -> None:
        if not self.shown:
            return
        if not self.memory or step % LINE_EVERY == 0:  # reading it walks all tensors
            self.memory = _memory_in_use()
        figures = {"loss": f"{loss:.3f}", "tokens/s": f"{tokens_per_s:,.0f}", "memory": self.memory}
        if self.bar is not None:
            self.bar.set_postfix(figures, refresh=False)
            self.bar.update(step - self.bar.n)
        elif step % LINE_EVERY == 0 or step == self.steps:
            print(
                f"step {step}/{self.steps}", *(f"{key} {value}" for key, value in figures.items()), sep="  ", flush=True
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _memory_in_use() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.memory_allocated() / 1e6:,.0f} MB"
    resident = memory_summary().rss_nbytes
    return "?" if resident is None else f"{resident / 1e6:,.0f} MB"


def main() -> None:
    args = parse_args()
    group = zs_engine.init_distributed()
    with zs_comm.agreed(group, "reading the configuration and the text"):  # a file that one rank lacks stops them all
        config = load_config(args.config, args.steps)
        corpus = Corpus(read_text(args.text), context=args.context, seed=args.seed)

    held_before = live_tensor_nbytes("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(layers=args.layers, width=args.width, heads=args.heads, context=args.context))
    unsharded = unsharded_nbytes(model, config)
    engine, *_ = zs_engine.initialize(model=model, model_parameters=model.parameters(), config=config)

    recent: deque[Tensor] = deque(maxlen=50)
    if args.resume:
        _, client_state = engine.load_checkpoint(args.save)
        recent += [torch.tensor(loss, device=engine.device) for loss in (client_state or {}).get("recent", [])]
    if engine.global_steps >= args.steps:
        raise SystemExit(f"{args.save} has {engine.global_steps} steps already: give more --steps")
    trained = train(
        engine, corpus, steps=args.steps, group=group, held_before=held_before, save=args.save, every=args.save_every,
        recent=recent,
    )  # fmt: skip
    validation = evaluate(engine, corpus, engine.train_micro_batch_size_per_gpu())
    sample = write_sample(engine, args)

    if group.rank == 0:
        stage = config.get("zero_optimization", {}).get("stage", 0)
        precision = "bf16" if config.get("bf16", {}).get("enabled") else "fp32"
        rows = {
            "stage": f"{stage}, {precision}, {group.size} rank{'s' if group.size > 1 else ''} on {engine.device.type}",
            "training loss": f"{trained.loss:.3f} (mean of the last 50 steps)",
            "validation loss": f"{validation:.3f} (per byte; chance is {torch.tensor(256.0).log():.3f})",
            "tokens/s": f"{trained.tokens_per_s:,.0f}",
            "bytes per rank": f"{trained.state_nbytes / 1e6:.1f} MB of parameters, gradients and optimizer state",
            "unsharded": f"{unsharded / 1e6:.1f} MB",
        }
        print("\n" + "\n".join(f"{name:>16}  {value}" for name, value in rows.items()))
        print(f"\n{sample}\n", flush=True)
    zs_comm.shutdown()


if __name__ == "__main__":
    main()
