"""`zs`: run a script on ranks, report what is installed, print the configuration's schema, judge a configuration."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
import zs_offload_aio
from zs_comm import ConfigError, lint, nodes, torchrun

from zs_engine.config import examine, language

PACKAGES = ("zs-engine", "zs-comm", "zs-ckpt", "zs-offload-aio", "zs-zero", "torch", "pydantic")
OPTIONAL = ("zs-pipe", "zs-profile", "zs-tensor", "zs-compress")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="zs", description=__doc__)
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="start a script on every rank of this node", allow_abbrev=False)
    run.add_argument("-n", "--ranks", dest="slots", type=int, help="processes on this node (default: one for each GPU)")
    run.add_argument("--nodes", dest="count", type=int, help="nodes of the job; run the same command on each")
    run.add_argument("--node-rank", dest="index", type=int, help="this node's number, from 0")
    run.add_argument("--master-addr", help="a name or address of node 0")
    run.add_argument("--master-port", type=int)
    run.add_argument("--hostfile", help="lines of 'host slots=N'; this node is found by its name")
    run.add_argument("--dry-run", action="store_true", help="print torchrun's command for this node, start nothing")
    run.add_argument("-m", "--module", action="store_true", help="the script is a module's name")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="script.py ...")
    run.set_defaults(function=_run)
    commands.add_parser("report", help="versions, devices, backends, packages").set_defaults(function=_report)
    schema = commands.add_parser("schema", help="the configuration's JSON Schema")
    schema.add_argument("--markdown", action="store_true", help="as tables: docs/configuration.md")
    schema.set_defaults(function=_schema)
    check = commands.add_parser("lint", help="a verdict for every key of a configuration")
    check.add_argument("config", help="a JSON file, or base64")
    check.add_argument("--world", type=int, help="data-parallel ranks, to check the batch sizes for")
    check.add_argument("--json", action="store_true", help='{"ok": bool, "keys": [{"path", "line", ...}]}')
    check.add_argument("--unknown-keys", choices=("error", "warn"), default="error")
    check.set_defaults(function=_lint)
    for point in metadata.entry_points(group="zs_engine.commands"):  # of other packages: `zs ckpt`
        text = f"of {point.dist.name if point.dist else point.module}; --help tells more"
        # no character begins an option here: they are all the command's own
        other = commands.add_parser(point.name, help=text, add_help=False, prefix_chars="\0")
        other.add_argument("argv", nargs="*")
        other.set_defaults(function=lambda options, point=point: point.load()(options.argv))
    options = parser.parse_args(argv)
    try:
        return int(options.function(options))
    except ConfigError as error:
        print(f"zs: {error}", file=sys.stderr)
        return 2


def _run(options: Any) -> int:
    if not options.command:
        raise ConfigError("run: give a script")
    node = nodes.from_hostfile(options.hostfile, index=options.index) if options.hostfile else nodes.from_slurm()
    given = {name: getattr(options, name) for name in ("count", "index", "master_addr", "master_port", "slots")}
    if node is None and (options.count or 1) > 1 and None in (options.index, options.master_addr):
        raise ConfigError(f"run: {options.count} nodes need --node-rank and --master-addr")
    node = replace(node or nodes.Node(), **{name: value for name, value in given.items() if value is not None})
    command = ["-m", *options.command] if options.module else options.command
    argv = torchrun.arguments(command, ranks=node.slots or torch.cuda.device_count() or 1, node=node)
    if options.dry_run:
        print(shlex.join(["torchrun", *argv]))
        return 0
    failure = torchrun.run(argv)
    if failure is None:
        return 0
    print(f"zs run: {failure}", file=sys.stderr)
    return failure.code


def _report(_: Any) -> int:
    rows = [("python", platform.python_version()), ("platform", platform.platform()), ("cpus", str(os.cpu_count()))]
    installed = {package.name: package.version for package in metadata.distributions()}
    rows += [(name, installed.get(name, "not installed")) for name in PACKAGES]
    rows += [(name, installed.get(name, f"not installed (optional: pip install {name})")) for name in OPTIONAL]
    aio = [*(name for name, why in zs_offload_aio.backends().items() if not why), zs_offload_aio.optim.isa()]
    rows += [("backends", ", ".join(torchrun.backends())), ("aio", ", ".join(aio))]
    devices = [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    rows += devices or [("cuda", "no device")]
    print("\n".join(f"{name:16}{value}" for name, value in rows))
    return 0


def _schema(options: Any) -> int:
    made = language()
    print(lint.page(made) if options.markdown else json.dumps(made.model_json_schema(), indent=2))
    return 0


def _lint(options: Any) -> int:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    find = functools.partial(examine, world=options.world)
    how = {"as_json": options.json, "unknown_keys": options.unknown_keys, "colour": colour}
    text, ok = lint.report(options.config, language(), lambda *read: find(*read)[2], **how)
    print(text)
    return 0 if ok else 1
