"""The command line: `bench`, `tune` and `info`. Exit codes: 0; 1 what the system refused; 2 bad input; 130 Ctrl-C."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import NoReturn

from . import bench, info, tune
from .engine import BACKENDS, Engine
from .report import Progress, parse_size, show_size, table

_LEAST = 1 << 20  # bytes worth measuring


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Errors are one line on stderr."""
    parser = _parser()
    args = parser.parse_args(arguments)
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = [signal.signal(number, _interrupt) for number in ends]
    try:
        code: int = args.run(args)
        return code
    except ValueError as error:
        return _refuse(str(error), 2)
    except OSError as error:
        return _refuse(str(error), 1)
    except MemoryError as error:
        return _refuse(f"not enough memory: {error}", 1)
    except KeyboardInterrupt:
        return _refuse("interrupted", 130)
    finally:
        for number, handler in zip(ends, before, strict=True):
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    """Ends as Ctrl-C does: what was made on the way is removed."""
    raise KeyboardInterrupt


def _refuse(text: str, code: int) -> int:
    print(f"zs_offload_aio: error: {' '.join(text.split())}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; `--help` has the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"zs_offload_aio: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m zs_offload_aio", description="How fast files are, and why.")
    commands = parser.add_subparsers(required=True, metavar="bench | tune | info")

    one = commands.add_parser("bench", help="measure a file or a disk, beside fio where it is installed")
    one.add_argument(
        "path", metavar="FILE_OR_FOLDER", help="a file is only read; in a folder a file is made and removed"
    )
    one.add_argument("--size", type=_size, help="bytes of the file: 512M, 4G (1G in a folder, all of a file)")
    one.add_argument("--operations", type=_operations, help="of write, read, mixed, separated by commas (all)")
    one.add_argument("--write", action="store_true", help="overwrite an existing FILE: its content is lost")
    one.add_argument("--chunk", type=_size, help="bytes of one transfer (calibrated)")
    one.add_argument("--depth", type=int, help="transfers in flight (calibrated)")
    one.add_argument("--backend", choices=BACKENDS, help="(the first that works)")
    one.add_argument("--rounds", type=_positive, default=3, help="the median is shown (%(default)s)")
    one.add_argument("--no-fio", action="store_true", help="not beside fio")
    one.set_defaults(run=_bench)

    two = commands.add_parser("tune", help="find chunk size and depth; writes an aio section for DeepSpeed's JSON")
    two.add_argument("folder", metavar="FOLDER", help="on the disk in question; a file is made there and removed")
    two.add_argument("--size", type=_size, default=256 << 20, help="bytes moved for each setting and direction (256M)")
    two.add_argument("--rounds", type=_positive, default=2, help="(%(default)s)")
    two.add_argument("--backend", choices=BACKENDS, help="(the first that works)")
    two.add_argument("--output", metavar="FILE", help="where the JSON goes (stdout)")
    two.add_argument("--merge", action="store_true", help="put the section into an existing FILE, a DeepSpeed JSON")
    two.set_defaults(run=_tune)

    three = commands.add_parser("info", help="backends, alignment and limits, and why something is missing")
    three.add_argument("path", metavar="PATH", nargs="?", help="a file or folder to say it of")
    three.set_defaults(run=_info)
    return parser


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _operations(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = sorted(set(names) - set(bench.OPERATIONS))
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: one of {', '.join(bench.OPERATIONS)}")
    return [name for name in bench.OPERATIONS if name in names]


# -- bench ------------------------------------------------------------------------------------------------------------


def _bench(args: argparse.Namespace) -> int:
    engine = Engine(backend=args.backend, chunk_nbytes=args.chunk, depth=args.depth)
    with engine:
        if os.path.isdir(args.path):
            nbytes = _large_enough(args.size or 1 << 30)
            with bench.scratch_file(args.path) as path:
                _bench_file(args, engine, path, nbytes, args.operations or list(bench.OPERATIONS), fresh=True)
            return 0
        found = os.stat(args.path).st_size
        operations = args.operations or (list(bench.OPERATIONS) if args.write else ["read"])
        writes = [name for name in operations if name != "read"]
        if writes and not args.write:
            raise ValueError(f"{args.path} exists: --write allows {' and '.join(writes)} to overwrite its content")
        if args.size is not None and args.size > found:
            raise ValueError(f"--size {args.size}: {args.path} has {found} bytes")
        _bench_file(args, engine, args.path, _large_enough(args.size or found), operations, fresh=False)
    return 0


def _large_enough(nbytes: int) -> int:
    if nbytes < _LEAST:
        raise ValueError(f"{nbytes} bytes are too few to measure: at least {_LEAST}")
    return nbytes - nbytes % 4096


def _bench_file(
    args: argparse.Namespace, engine: Engine, path: str, nbytes: int, operations: list[str], *, fresh: bool
) -> None:
    buffers = bench.Buffers(nbytes)
    rows: list[list[object]] = []
    if fresh:
        first = _shown("first write", nbytes, partial(bench.fill, engine, path, nbytes, buffers))
        rows.append(["first write", f"{first.gb_per_s:.2f}", *([] if args.no_fio else ["", ""])])
    with_fio = not args.no_fio and bench.fio_path() is not None
    failed = ""
    with engine.open(path, "r+" if set(operations) - {"read"} else "r") as file:
        mode = file.mode + (f" ({file.reason})" if file.reason else "")
        for operation in operations:
            ours: list[float] = []
            theirs: list[float] = []
            for turn in range(args.rounds):
                label = f"{operation} {turn + 1}/{args.rounds}"
                rate = _shown(label, nbytes, partial(bench.run, file, operation, nbytes, buffers))
                ours.append(rate.gb_per_s)
                if with_fio and not failed:
                    chunk, depth = _setting(engine, args, os.stat(path).st_dev, operation)
                    try:
                        beside = bench.fio(
                            path,
                            operation,
                            nbytes,
                            backend=engine.backend,
                            chunk_nbytes=chunk,
                            depth=depth,
                            direct=file.mode == "direct",
                        )
                        theirs.append(beside.gb_per_s)
                    except bench.FioFailedError as error:
                        failed = str(error)
            row: list[object] = [operation, f"{median(ours):.2f}"]
            if not args.no_fio:
                row += [f"{median(theirs):.2f}", f"{median(ours) / median(theirs):.2f}"] if theirs else ["-", "-"]
            rows.append(row)
    print(f"{args.path}: {show_size(nbytes)}, {mode}, {engine.backend}")
    chunk, depth = _setting(engine, args, os.stat(path).st_dev, operations[0])
    print(f"transfers of {show_size(chunk)}, {depth} in flight; medians of {args.rounds}, GB/s")
    print(table(["operation", "zs", *([] if args.no_fio else ["fio", "zs / fio"])], rows))
    if not args.no_fio and not with_fio:
        print("fio is not installed: nothing to compare with")
    if failed:
        print(f"fio failed: {failed}")


def _shown(label: str, nbytes: int, measure: Callable[[Callable[[int], None]], bench.Rate]) -> bench.Rate:
    progress = Progress(label, nbytes)
    try:
        return measure(progress.add)
    finally:
        progress.close()


def _setting(engine: Engine, args: argparse.Namespace, device: int, operation: str) -> tuple[int, int]:
    """Chunk size and depth as the engine uses them now; what it asks for before it has seen traffic."""
    direction = "write" if operation == "write" else "read"
    for found in engine.stats()["calibration"]:
        if found["device"] == device and found["direction"] == direction:
            return int(found["chunk_nbytes"]), int(found["depth"])
    return args.chunk or 1 << 20, args.depth or 32


# -- tune and info ----------------------------------------------------------------------------------------------------


def _tune(args: argparse.Namespace) -> int:
    if not os.path.isdir(args.folder):
        raise NotADirectoryError(f"{args.folder} is no folder")
    if args.merge and not args.output:
        raise ValueError("--merge needs --output FILE")
    config = tune.load_config(args.output, merge=args.merge) if args.output else {}
    nbytes = _large_enough(args.size)
    bars: list[Progress] = []

    def say(label: str, nbytes: int) -> Callable[[int], None]:
        for bar in bars:
            bar.close()
        bars[:] = [Progress(label, nbytes)]
        return bars[0].add

    try:
        points = tune.sweep(args.folder, nbytes, args.rounds, args.backend, say)
    finally:
        for bar in bars:
            bar.close()
    chosen = tune.best(points)
    rows = [
        [
            show_size(point.chunk_nbytes),
            point.depth,
            f"{point.read:.2f}",
            f"{point.write:.2f}",
            f"{point.both:.2f}",
            "best" if point is chosen else "",
        ]
        for point in points
    ]
    text = tune.dump(config, tune.section(chosen))
    # with the JSON on stdout the table goes to stderr, so that the one can be redirected and the other be read
    stream = sys.stdout if args.output else sys.stderr
    print(table(["chunk", "depth", "read GB/s", "write GB/s", "both GB/s", ""], rows), file=stream)
    if args.output:
        tune.save(args.output, text)
        print(f"written: {args.output}")
    else:
        print(text, end="")
    return 0


def _info(args: argparse.Namespace) -> int:
    found = info.rows(args.path)
    width = max(len(name) for name, _ in found)
    for name, value in found:
        print(f"{name:<{width}}  {value}")
    return 0
