"""`import`: what importing a package costs in fresh interpreters, beyond torch where it needs torch."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys

import probes
import tables
from launch import say

PACKAGES = ("zs_comm", "zs_zero", "zs_engine")  # beyond torch
BY_THEMSELVES = ("zs_offload_aio",)
PROBE = """
import time
began = time.perf_counter()
import {first}
middle = time.perf_counter()
import {package}
print(middle - began, time.perf_counter() - middle)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="import")


def main(args: argparse.Namespace) -> int:
    machine = probes.hardware()
    present = [package for package in (*PACKAGES, *BY_THEMSELVES) if importlib.util.find_spec(package)]
    torch_s: list[float] = []
    beyond_s: dict[str, list[float]] = {package: [] for package in present}
    for round_ in range(args.rounds):
        for package in present:
            first = "time" if package in BY_THEMSELVES else "torch"
            probe = [sys.executable, "-c", PROBE.format(package=package, first=first)]
            printed = subprocess.run(probe, check=True, capture_output=True, text=True).stdout.split()
            if first == "torch":
                torch_s.append(float(printed[0]))
            beyond_s[package].append(float(printed[1]))
        say(f"round {round_ + 1}/{args.rounds}")
    rows = [["torch", tables.spread(torch_s)], *([name, tables.spread(xs)] for name, xs in beyond_s.items())]
    text = f"""# Import

{machine}.

Seconds, medians (least-most) of {args.rounds} rounds in fresh interpreters; each package beyond torch, but
{", ".join(BY_THEMSELVES)} by itself.

{tables.table(["import", "seconds"], rows)}
"""
    print(text)
    say(f"written: {tables.save(args.name, text)}")
    return 0
