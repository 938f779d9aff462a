"""`zs ckpt`: look into checkpoints, check them, compare, convert and remove them.

A checkpoint is a folder of tags, of which the newest is taken where `--tag` names none, or a tag's own folder.
Exit codes: 0 done; 1 verify found damage, or diff a difference; 2 it could not be done, in one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zs_comm import ZsError

from . import reports
from .names import MANIFEST


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        return int(options.function(options))
    except BrokenPipeError:  # `zs ckpt inspect ... | head`: nobody reads on
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # what is left is flushed there at exit
        return 2
    except (ZsError, OSError) as error:
        print(f"zs ckpt: {'; '.join(str(error).split(chr(10)))}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zs ckpt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[Any], int], text: str, *paths: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        for path in paths:
            made.add_argument(path, metavar=path.upper(), type=Path)
        made.set_defaults(function=function)
        return made

    command("ls", _ls, "the checkpoints of a folder, newest first", "path")
    verify = command("verify", _verify, "compare every checksum; exit code 1 where something is wrong", "path")
    _tag(verify)
    verify.add_argument("--all", action="store_true", help="every tag of the folder")
    inspect = command("inspect", _inspect, "the tensors of a checkpoint: shapes, sizes, lay-out", "path")
    _tag(inspect)
    inspect.add_argument("--name", help="only names that match this pattern, as in 'model/*'")
    inspect.add_argument("--objects", action="store_true", help="what is no tensor, as JSON")
    diff = command("diff", _diff, "what differs between two checkpoints; exit code 1 where something does", "a", "b")
    diff.add_argument("--tag-a", help="tag of the first (the newest)")
    diff.add_argument("--tag-b", help="tag of the second (the newest)")
    export = command("export", _export, "write safetensors in Hugging Face's layout, or a DCP folder", "path", "target")
    _tag(export)
    export.add_argument("--to", choices=("safetensors", "dcp"), default="safetensors")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the floating-point tensors (as saved)")
    export.add_argument("--max-shard-size", default="5GB", help="bytes of a file, such as 5GB or 500MiB (5GB)")
    export.add_argument("--key", default="model", help="what to export (model)")
    deepspeed = command("import-deepspeed", _import_deepspeed, "read a checkpoint of DeepSpeed, stages 1 to 3 or "
                        "universal, and save it here", "source", "path")  # fmt: skip
    deepspeed.add_argument("--source-tag", help="tag of the DeepSpeed checkpoint (what its `latest` names)")
    dcp = command(
        "import-dcp", _import_dcp, "read a torch.distributed.checkpoint folder and save it here", "source", "path"
    )
    for one in (deepspeed, dcp):
        one.add_argument("--tag", help="the new checkpoint's tag")
    prune = command("prune", _prune, "remove all valid checkpoints but the newest", "path")
    prune.add_argument("--keep", type=int, required=True, help="how many to keep")
    return parser


def _tag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tag", help="the checkpoint's name in the folder (the newest)")


def _found(path: Path, tag: str | None) -> tuple[Path, str | None]:
    """The folder of tags and the tag, where `path` may be the tag's own folder."""
    if tag is None and (path / MANIFEST).exists():
        path = path.absolute()
        return path.parent, path.name
    return path, tag


def _ls(options: Any) -> int:
    rows = reports.listing(options.path)
    if not rows:
        print(f"no checkpoint has been committed in {options.path}")
        return 0
    print(
        reports.table(("", "tag", "step", "ranks", "tensors", "size", "state"), rows, right="step ranks tensors size")
    )
    return 0


def _verify(options: Any) -> int:
    from .verifying import tags, verify

    path, tag = _found(options.path, options.tag)
    good = True
    wanted: list[str | None] = [*reversed(tags(path))] if options.all else [tag]
    for one in wanted or [None]:
        with reports.Bar(f"verify {one or path.name}") as bar:
            report = verify(path, one, progress=bar)
        print(report)
        for name in report.leftovers:
            print(f"  left over by a save that did not commit: {name}")
        good = good and report.ok
    return 0 if good else 1


def _inspect(options: Any) -> int:
    from .snapshot import Snapshot

    path, tag = _found(options.path, options.tag)
    with Snapshot(path, tag) as snapshot:
        if options.objects:
            shown = {"objects": snapshot.manifest.objects, "rank_objects": list(snapshot.manifest.rank_objects),
                     "client_state": snapshot.manifest.client_state}  # fmt: skip
            print(json.dumps(shown, indent=2, allow_nan=False))
            return 0
        rows = reports.tensors(snapshot.manifest, options.name)
        print(reports.table(("tensor", "shape", "dtype", "size", "pieces", "files"), rows, right="size pieces files"))
        print(reports.summary(snapshot.manifest))
    return 0


def _diff(options: Any) -> int:
    from .snapshot import Snapshot

    first, second = _found(options.a, options.tag_a), _found(options.b, options.tag_b)
    with Snapshot(*first) as a, Snapshot(*second) as b, reports.Bar("diff") as bar:
        rows = reports.differences(a, b, bar)
    if rows:
        print(reports.table(("name", "difference"), rows))
    print(f"{len(rows)} differences" if rows else "no difference")
    return 1 if rows else 0


def _export(options: Any) -> int:
    path, tag = _found(options.path, options.tag)
    if options.to == "dcp":
        from .dcp import export_dcp

        export_dcp(path, options.target, tag=tag)
        print(options.target)
        return 0
    from .exporting import export

    with reports.Bar("export") as bar:
        files = export(
            path, options.target, tag=tag, key=options.key, dtype=options.dtype,
            max_shard_size=options.max_shard_size, progress=bar,
        )  # fmt: skip
    print("\n".join(map(str, files)))
    return 0


def _import_deepspeed(options: Any) -> int:
    from .importing import import_deepspeed

    tags = {"source_tag": options.source_tag, "tag": options.tag}
    with reports.Bar("import") as bar:
        saved = import_deepspeed(options.source, options.path, **tags, progress=bar)
    print(f"{saved.path}: {reports.size(saved.nbytes)}")
    return 0


def _import_dcp(options: Any) -> int:
    from .dcp import import_dcp

    with reports.Bar("import") as bar:
        saved = import_dcp(options.source, options.path, tag=options.tag, progress=bar)
    print(f"{saved.path}: {reports.size(saved.nbytes)}")
    return 0


def _prune(options: Any) -> int:
    from .retention import prune
    from .saving import check_arguments

    check_arguments("auto", options.keep)
    removed = prune(options.path, options.keep)
    print("\n".join(f"removed {tag}" for tag in removed) or "nothing to remove")
    return 0
