"""Tortures a checkpoint system, counts what came of it, and exits with 1 where anything was not as it must be.

    python drive.py kills --runs 500 --jobs 2           SIGKILL at every file operation of a save, and at random times
    python drive.py faults --jobs 2                     every file operation answered by an error, or by a short count
    python drive.py log --out DIR                       DIR/<scenario>/before: the folder; /log0: the next save

`--system` takes a peer's name (peers.py). The process that forks the victims is this one started again with the shim
preloaded; nothing else runs in it, so that a fork copies one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torture import shim, systems
from torture.runs import Lane, Plan

TWO_RANKS = 0.1  # of the runs
MUST_FAIL = {
    "create",
    "write",
    "truncate",
    "fsync",
    "rename",
    "mkdir",
    "link",
}  # an error there is an error of the save


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not shim.preloaded():
        return start(sys.argv[1:] if argv is None else argv)
    logging.disable(logging.CRITICAL)  # what is said about a failure that was asked for
    with tempfile.TemporaryDirectory(prefix="zs-torture-", dir=args.folder) as folder:
        system = systems.make(args.system)
        lanes = [
            Lane(system, scenario, Path(folder) / f"{index}.main")
            for index, scenario in enumerate(system.scenarios)
            if args.scenario in ("", scenario.name)
        ]
        if args.what == "log":
            for lane in lanes:
                lane.record(args.out / lane.scenario.name)
            return 0
        for lane in lanes:
            lane.measure()
        plans = {lane.scenario.name: list(of_lane(args.what, lane)) for lane in lanes}
        results = carry_out(args, system, lanes, plans, Path(folder))
    for result in results:
        if args.what == "faults":
            result["bad"] += unreported(result)
    if args.out:
        args.out.write_text("".join(json.dumps(result) + "\n" for result in results))
    print(summary(args, results))
    return int(any(result["bad"] for result in results))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", choices=["kills", "faults", "log"])
    made.add_argument("--runs", type=int, default=500, help="killed runs at least (%(default)s)")
    made.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--system", default="zs")
    made.add_argument("--scenario", default="", help="only this one")
    made.add_argument("--folder", default=None, help="where to save (default: the temporary folder)")
    made.add_argument("--out", type=Path, help="every run's result as a line of JSON; of `log`: a folder")
    made.add_argument("--progress", action="store_true")
    made.add_argument("--brief", action="store_true", help="the table only")
    return made


def start(argv: list[str], **options: Any) -> int:
    """This program in a process with the shim preloaded: its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        library = shim.build(Path(folder))
        # io_uring and libaio do not go through libc, where the shim is
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "ZS_AIO_BACKEND": "threads"}
        command = [sys.executable, "-P", str(Path(__file__).resolve()), *argv]
        return subprocess.run(command, env=environment, check=False, **options).returncode


# ---- what is planned ----


def of_lane(what: str, lane: Lane) -> Iterator[Plan]:
    """Every operation of an undisturbed save, rank by rank: before it, half-way in it, and after the last one."""
    name = lane.scenario.name
    for rank, kinds in enumerate(lane.kinds):
        for at, kind in enumerate(kinds, 1):
            plan = Plan(name, at=at, rank=rank)
            if what == "faults":
                if lane.scenario.world == 1:
                    yield from (replace(plan, errno=number) for number in (5, 28))  # EIO, ENOSPC
                    if kind == "write":
                        yield replace(plan, errno=0)
                continue
            yield plan
            if kind == "write":
                yield replace(plan, when=shim.HALF)
            if kind in ("rename", "link") or at == len(kinds):
                yield replace(plan, when=shim.AFTER)


def at_random(lanes: list[Lane], draw: random.Random) -> Plan:
    """Most are killed from outside at some time, some at an operation; some are stopped first."""
    two = [lane for lane in lanes if lane.scenario.world > 1]
    one = [lane for lane in lanes if lane.scenario.world == 1]
    lane = draw.choice(two if two and (not one or draw.random() < TWO_RANKS) else one)
    rank, stop, seed = draw.randrange(lane.scenario.world), draw.random() < 0.15, draw.randrange(1 << 30)
    if draw.random() < 0.7:
        return Plan(lane.scenario.name, moment=draw.random(), stop=stop, rank=rank, seed=seed)
    at = draw.randint(1, max(len(lane.kinds[rank]), 1))
    when = draw.choice([shim.BEFORE, shim.AFTER, shim.HALF])
    return Plan(lane.scenario.name, at=at, when=when, stop=stop, rank=rank, seed=seed)


# ---- carrying it out ----


def carry_out(
    args: argparse.Namespace, system: Any, lanes: list[Lane], plans: dict[str, list[Plan]], folder: Path
) -> list[dict[str, Any]]:
    """Share the plans among `--jobs` forked processes; each has folders of its own."""
    everything = [plan for of_one in plans.values() for plan in of_one]
    random.Random(args.seed).shuffle(everything)
    wanted = args.runs if args.what == "kills" else 0
    workers = []
    for job in range(args.jobs):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                worker(args, system, lanes, everything[job :: args.jobs], -(-wanted // args.jobs), folder, job)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        workers.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in workers]
    if any(statuses):
        raise RuntimeError(f"workers ended with statuses {statuses}")
    lines = [line for job in range(args.jobs) for line in (folder / f"results{job}").read_text().splitlines()]
    return [json.loads(line) for line in lines]


def worker(
    args: argparse.Namespace, system: Any, lanes: list[Lane], plans: list[Plan], wanted: int, folder: Path, job: int
) -> None:
    own = {}
    for index, lane in enumerate(lanes):
        mine = Lane(system, lane.scenario, folder / f"{index}.{job}")
        mine.seconds, mine.kinds = lane.seconds, lane.kinds
        own[lane.scenario.name] = mine
    draw, killed, done = random.Random(f"{args.seed} {job}"), 0, 0
    with (folder / f"results{job}").open("w") as out:
        while plans or killed < wanted:
            if done > 4 * wanted + 10000:
                raise RuntimeError(f"only {killed} of {done} runs were killed")
            plan = plans.pop() if plans else at_random(lanes, draw)
            result = own[plan.scenario].run(plan)
            killed, done = killed + result.killed, done + 1
            out.write(json.dumps({**vars(result), "title": str(plan)}) + "\n")
            if args.progress and (result.bad or done % 100 == 0):
                print(f"[{job}] {done} runs, {killed} killed {result.bad or ''}", file=sys.stderr, flush=True)


# ---- what came of it ----


def unreported(result: dict[str, Any]) -> list[str]:
    """Of a save that was told of an error: whether it said so."""
    first, operation, told = result["ended"].split("\n")[0], result["hit"].split()[0], result["plan"]["errno"]
    if told == 0:
        return [] if first == "returned" else [f"a short count at {result['hit']} was an error: {result['ended']}"]
    if first == "returned":  # a lock's word is only for people; after the commit it is leftovers' locks that are taken
        quiet = result["hit"].endswith("lock") and (result["committed"] or operation != "create")
        return [f"an error at {result['hit']} was kept quiet"] if operation in MUST_FAIL and not quiet else []
    named = os.path.basename(result["hit"].split(maxsplit=1)[1]).split(".tmp-")[0]
    if named not in result["ended"].split("\n")[1]:
        return [f"an error at {result['hit']} does not name it: {result['ended']}"]
    if not {"OSError", "ZsError"} & set(first.split()):
        return [f"an error at {result['hit']} came as {first.split()[0]}: {result['ended']}"]
    return []


def summary(args: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    """A table by scenario, and each run that was not as it must be."""
    rows = [f"{'scenario':32}{'runs':>7}{'killed':>8}{'old':>7}{'new':>7}{'torn':>7}{'other':>7}{'bad':>6}"]
    for name in [*dict.fromkeys(result["plan"]["scenario"] for result in results), ""]:
        mine = [result for result in results if not name or result["plan"]["scenario"] == name]
        counts = Counter(result["outcome"] for result in mine)
        torn, other = counts["torn"] + counts["damaged"], counts["lost"]
        killed, bad = (sum(map(bool, (result[key] for result in mine))) for key in ("killed", "bad"))
        cells = [f"{len(mine):7}{killed:8}{counts['old']:7}{counts['new']:7}{torn:7}{other:7}{bad:6}"]
        rows.append(f"{name or 'all':32}" + cells[0])
    bad = [result for result in results if result["bad"]]
    rows += (
        []
        if args.brief
        else [f"{result['title']} [{result['hit']}]: {'; '.join(result['bad'])}" for result in bad[:20]]
    )
    return "\n".join([f"{args.system}, {args.what}, seed {args.seed}", *rows])


if __name__ == "__main__":
    sys.exit(main())
