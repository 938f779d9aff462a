"""Text for the example: where it comes from, and how a step's batch is drawn from it. Tokens are bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def read_text(path: Path | None = None) -> bytes:
    """The bytes of a file, or of all text files below a folder in the order of their paths.

    Without a path: the topics of the Python language reference that ship inside CPython, about half a megabyte.

    Raises:
        FileNotFoundError: nothing is at `path`, or the folder holds no text.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics)).encode()
    if path.is_file():
        return path.read_bytes()
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder at {path}")
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and not _is_hidden(p.relative_to(path))]
    texts = [data for file in files if b"\0" not in (data := file.read_bytes())]
    if not any(texts):
        raise FileNotFoundError(f"the folder {path} holds no text file")
    return b"\n\n".join(texts)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


class Corpus:
    """A text of bytes cut into a training part and a held-out tail.

    Batches are a pure function of (seed, step): the global batch is the same for any number of ranks, and each rank
    takes its rows of it.

    Raises:
        ValueError: a part is shorter than one window of `context` + 1 bytes.
    """

    def __init__(self, text: bytes, *, context: int, held_out: float = 0.1, seed: int = 0) -> None:
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        cut = len(tokens) - int(len(tokens) * held_out)
        self.training, self.validation = tokens[:cut], tokens[cut:]  # (bytes,) each, uint8
        self.context = context
        self.seed = seed
        if len(self.validation) <= context:
            needed = int((context + 1) / held_out) + 1
            raise ValueError(f"the text has {len(text)} bytes; a context of {context} needs about {needed}")

    def training_batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """`batch_size` windows at random places: ids and targets, each (batch_size, context) int64."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(len(self.training) - self.context, (batch_size,), generator=generator)
        return self._windows(self.training, starts)

    def validation_batches(self, batch_size: int, *, most: int = 256) -> list[tuple[Tensor, Tensor]]:
        """At most `most` windows spread evenly over the held-out part, always the same ones, in batches."""
        room = len(self.validation) - self.context
        starts = torch.linspace(0, room - 1, min(most, max(1, room // self.context))).long()
        return [self._windows(self.validation, part) for part in starts.split(batch_size)]

    def _windows(self, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        windows = tokens[starts[:, None] + torch.arange(self.context + 1)].long()
        return windows[:, :-1], windows[:, 1:]
