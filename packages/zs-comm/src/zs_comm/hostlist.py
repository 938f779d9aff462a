"""Reading SLURM's compressed lists: ``node[003-005,9],gpu1`` and ``2(x3),1``."""

from __future__ import annotations

import re

from .errors import ConfigError


def expand_hostlist(text: str) -> list[str]:
    """The host names in a SLURM node list, in order; leading zeros are kept (``n[08-10]`` is n08, n09, n10)."""
    hosts: list[str] = []
    for part in _split_outside_brackets(text):
        hosts.extend(_expand(part, text))
    if not hosts:
        raise ConfigError(f"node list {text!r}: no host in it")
    return hosts


def expand_tasks_per_node(text: str) -> list[int]:
    """Tasks on each node from SLURM's ``2(x3),1``: [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", part)
        if match is None:
            raise ConfigError(f"tasks per node {text!r}: {part!r} is not of the form 2 or 2(x3)")
        counts.extend([int(match[1])] * int(match[2] or 1))
    return counts


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if depth not in (0, 1):
            raise ConfigError(f"node list {text!r}: brackets do not match")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    if depth:
        raise ConfigError(f"node list {text!r}: brackets do not match")
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _expand(part: str, whole: str) -> list[str]:
    match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]*)\](.*)", part)
    if match is None:
        return [part]
    head, ranges, tail = match.groups()
    tails = _expand(tail, whole) if tail else [""]
    names: list[str] = []
    for item in ranges.split(","):
        bounds = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
        if bounds is None:
            raise ConfigError(f"node list {whole!r}: {item!r} is neither a number nor a range")
        first, last = bounds[1], bounds[2] or bounds[1]
        if int(last) < int(first):
            raise ConfigError(f"node list {whole!r}: the range {item!r} runs backwards")
        names += [f"{head}{n:0{len(first)}d}{end}" for n in range(int(first), int(last) + 1) for end in tails]
    return names
