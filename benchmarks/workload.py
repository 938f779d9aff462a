"""What every system trains: the model's sizes, its data, its optimizer, the configuration of the engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpt import GPT, GPTConfig  # the examples' model; run.py puts examples/ on the path
from torch import Tensor

SIZES = {
    "tiny": GPTConfig(layers=2, width=64, heads=4, context=32, vocab=256, init_std=0.02),
    "small": GPTConfig(layers=4, width=256, heads=4, context=128, vocab=4096, init_std=0.02),
    "short": GPTConfig(layers=4, width=256, heads=4, context=16, vocab=4096, init_std=0.02),  # hardly any activations
    "base": GPTConfig(layers=8, width=512, heads=8, context=256, vocab=8192, init_std=0.02),
    "large": GPTConfig(layers=12, width=768, heads=12, context=256, vocab=16384, init_std=0.02),
    "xl": GPTConfig(layers=24, width=1024, heads=16, context=1024, vocab=32768, init_std=0.02),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}


@dataclass(frozen=True)
class Workload:
    """One system's task. It travels to the worker processes as JSON, so its fields are plain values."""

    system: str
    size: str = "base"
    dtype: str = "fp32"
    micro_batch: int = 2  # sequences per rank and step
    steps: int = 8
    warmup: int = 2
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def model(self) -> GPT:
        """The model in fp32 on the workload's device; the same bits on every rank."""
        torch.manual_seed(0)
        return GPT(SIZES[self.size]).to(self.device)

    def batch(self, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Ids and targets (micro_batch, context): arithmetic progressions modulo the vocabulary, easy to learn."""
        config = SIZES[self.size]
        generator = torch.Generator().manual_seed(1000 * step + rank)
        start = torch.randint(config.vocab, (self.micro_batch, 1), generator=generator)
        stride = torch.randint(1, 8, (self.micro_batch, 1), generator=generator)
        ids = (start + stride * torch.arange(config.context + 1)) % config.vocab
        return ids[:, :-1].contiguous().to(self.device), ids[:, 1:].contiguous().to(self.device)

    def engine_config(self, stage: int) -> dict[str, Any]:
        """The JSON that zs and DeepSpeed are both given."""
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": 1,
            "steps_per_print": 10**9,
            "gradient_clipping": 0.0,  # stated: DeepSpeed 0.19 clips at 1.0 when it is absent, and nobody else does
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": self.dtype == "bf16"},
            "optimizer": {"type": "AdamW", "params": {**ADAMW, "betas": list(ADAMW["betas"])}},
        }
