"""One run: save, kill, look. Every part is a forked child of a process that has torch imported and no threads.

old save (step k)        committed before
the victim (step k + 1)  killed by the shim at its n-th file operation, or from outside after some time
the judge                loads (k or k + 1?), saves step k + 2, loads that, and looks for what was left over
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import replay, shim
from .children import HANG_S, ended, in_child, keep_status, kill, wait
from .states import Torn
from .systems import Nothing, Scenario, System


@dataclass(frozen=True)
class Plan:
    """Where a victim ends: at an operation, or after a time (a part of what an undisturbed save takes)."""

    scenario: str
    at: int = 0
    when: int = shim.BEFORE
    stop: bool = False  # SIGSTOP first; killed a moment later
    moment: float = -1.0
    errno: int | None = None  # not killed: the operation is answered by this errno; by a short count where it is 0
    rank: int = 0  # the one whose operations count
    seed: int = 0

    def __str__(self) -> str:
        if self.moment >= 0:
            where = f"after {self.moment:.2f} of its time"
        else:
            where = f"{('before', 'after', 'half-way in')[self.when]} operation {self.at}"
        end = "killed" if self.errno is None else f"told errno {self.errno}" if self.errno else "told a short count"
        stopped = " (stopped first)" if self.stop else ""
        ranks = f", rank {self.rank}" if self.rank else ""
        return f"{self.scenario}: {end}{stopped} {where}{ranks}"


@dataclass
class Result:
    """What came of a run; `bad` is empty where all is as it must be."""

    plan: dict[str, Any]
    killed: bool = False
    hit: str = "-"  # the operation where it was killed, or that failed
    committed: bool = False  # before that operation, of one that failed
    ended: str = ""  # how a victim that was told of an error ended: "returned", or the names of the exception's classes
    outcome: str = ""  # old, new, or what is bad about it
    bad: list[str] = field(default_factory=list)


class Lane:
    """One scenario in a folder of its own, run after run; what one run leaves is the next one's past."""

    def __init__(self, system: System, scenario: Scenario, folder: Path) -> None:
        self.system, self.scenario, self.folder = system, scenario, folder
        self.controls = [shim.shared_control() for _ in range(scenario.world)]
        self.step = -1  # of what is committed in the folder
        self.kinds: list[list[str]] = [[] for _ in range(scenario.world)]  # the operations of an undisturbed save
        self.seconds = 0.05  # that it takes
        folder.mkdir(parents=True, exist_ok=True)

    def measure(self) -> None:
        """Undisturbed saves like a victim's: which operations, and how long."""
        ops = self.record(self._aside / "record")
        self.kinds = [[op.kind for op in of_rank] for of_rank in ops]
        self._prepare()
        victims = [self._victim(rank, self.step + 1) for rank in range(self.scenario.world)]
        began = self._await_start(victims)
        while not all(control.returned for control in self.controls) and time.perf_counter() - began < HANG_S:
            time.sleep(0.0002)
        self.seconds = time.perf_counter() - began
        self._await_success(victims)
        self.step += 1

    def record(self, out: Path) -> list[list[replay.Op]]:
        """An undisturbed save whose operations are logged: `out`/before is the folder before it, `out`/log<rank>."""
        self._prepare()
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.folder, out / "before")
        (out / "root").write_text(os.path.realpath(self.folder))
        logs = [out / f"log{rank}" for rank in range(self.scenario.world)]
        for control, log in zip(self.controls, logs, strict=True):
            control.log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        victims = [self._victim(rank, self.step + 1) for rank in range(self.scenario.world)]
        self._await_success(victims)
        for control in self.controls:
            os.close(control.log_fd)
        self.step += 1
        shutil.copytree(self.folder, out / "after")
        return [replay.read_log(log, Path(os.path.realpath(self.folder))) for log in logs]

    def _await_success(self, victims: list[int]) -> None:
        for pid in victims:
            wait(pid, HANG_S)
        if set(map(_first_line, self.reports())) != {"returned"}:
            raise RuntimeError(f"{self.scenario.name}: an undisturbed save failed: {self.reports()}")

    def run(self, plan: Plan) -> Result:
        """Carry the plan out and judge what is left."""
        self._prepare()
        draw = random.Random(plan.seed)
        result = Result(asdict(plan))
        before = in_child(lambda: self.system.valid(self.folder)) if self.scenario.keep else 0
        target = self.controls[plan.rank]
        if plan.errno is None:
            target.at, target.when, target.how = plan.at, plan.when, shim.STOP if plan.stop else shim.KILL
        else:
            target.fail_at, target.fail_errno = plan.at, plan.errno
        victims = [self._victim(rank, self.step + 1) for rank in range(self.scenario.world)]
        self._end(plan, victims, draw, result)
        result.hit, result.committed = target.hit(), bool(target.hit_committed)
        result.ended = self.reports()[plan.rank]
        allowed = self._allowed()
        answer = in_child(lambda: self._judge(allowed, before))
        result.outcome, result.bad = answer["outcome"], [*result.bad, *answer["bad"]]
        self.step = self.step + 2 if answer["continues"] else -1
        return result

    # ---- the parts of a run ----

    def _prepare(self) -> None:
        """The folder with a committed step (an even one: the long state) and nothing else of importance."""
        if self.scenario.first or self.step < 0 or self.step % 2:
            _empty(self.folder)
            self.step = max(self.step, 0) // 2 * 2 + 2
            if not self.scenario.first:
                in_child(lambda: self.system.save(self.folder, self.step, _alone(self.scenario)))
        for control in self.controls:
            control.reset(self.folder)
            control.commit = self.system.commit.encode()
        _empty(self._aside)

    @property
    def _aside(self) -> Path:
        """Beside the folder: the ranks' rendezvous and what they report."""
        return self.folder.with_name(self.folder.name + ".aside")

    def _victim(self, rank: int, step: int) -> int:
        """Fork one rank of the save that is to die."""
        pid = os.fork()
        if pid:
            return pid
        try:
            control = self.controls[rank]
            shim.attach(control)
            self.system.prepare()
            group = self._group(rank)
            control.started = 1
            control.armed = 1
            self.system.save(self.folder, step, self.scenario, group)
            control.returned = 1
            control.armed = 0
            self._report(rank, "returned")
        except BaseException as error:
            self.controls[rank].armed = 0
            names = " ".join(kind.__name__ for kind in type(error).__mro__)
            said = str(error).replace("\n", " ")
            self._report(rank, f"{names}\n{said}\n{traceback.format_exc()}")
        finally:
            os._exit(0)

    def _group(self, rank: int) -> Any:
        if self.scenario.world == 1:
            return None
        from torch.distributed import FileStore
        from zs_comm import init_distributed

        store = FileStore(str(self._aside / "rendezvous"), self.scenario.world)
        group = init_distributed("gloo", store=store, rank=rank, world=self.scenario.world, timeout_s=30.0)
        store.set(f"connected/{rank}", "")
        store.wait([f"connected/{other}" for other in range(self.scenario.world)])
        return group

    def _report(self, rank: int, text: str) -> None:
        (self._aside / f"rank{rank}").write_text(text)

    def reports(self) -> list[str]:
        """How each rank's save ended, in its own words; empty where it could not say."""
        paths = [self._aside / f"rank{rank}" for rank in range(self.scenario.world)]
        return [path.read_text() if path.exists() else "" for path in paths]

    def _await_start(self, victims: list[int]) -> float:
        deadline = time.monotonic() + HANG_S
        while not all(control.started for control in self.controls):
            if time.monotonic() > deadline or any(ended(pid) is not None for pid in victims):
                raise RuntimeError(f"{self.scenario.name}: a victim did not start: {self.reports()}")
            time.sleep(0.0002)
        return time.perf_counter()

    def _end(self, plan: Plan, victims: list[int], draw: random.Random, result: Result) -> None:
        """Wait for the end of the victims, and see to it."""
        target = victims[plan.rank]
        if plan.moment >= 0:
            self._await_start(victims)
            time.sleep(plan.moment * self.seconds)
            if plan.stop:
                os.kill(target, signal.SIGSTOP)
                self._look_while_stopped(target, result)
            kill(target)
        if plan.stop and plan.moment < 0:
            self._look_while_stopped(target, result)
            kill(target)
        status = wait(target, HANG_S)
        if status is None:
            result.bad.append(f"the save hung for {HANG_S:.0f} s")
            kill(target)
            status = wait(target, HANG_S)
        result.killed = status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        others = [pid for pid in victims if pid != target]
        if others and plan.errno is None:
            time.sleep(draw.random() * self.seconds)  # the launcher ends the others a moment later
            for pid in others:
                kill(pid)
        for pid in others:
            if wait(pid, HANG_S) is None:
                result.bad.append("another rank's save hung")
                kill(pid)
                wait(pid, HANG_S)

    def _look_while_stopped(self, target: int, result: Result) -> None:
        """A writer that stands still: a reader sees what was committed."""
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline:
            found, status = os.waitpid(target, os.WUNTRACED | os.WNOHANG)
            if found and os.WIFSTOPPED(status):
                break
            if found:
                keep_status(target, status)
                return
            time.sleep(0.0005)
        allowed = self._allowed()
        answer = in_child(lambda: self._seen(allowed))
        result.bad += [f"while it was stopped: {text}" for text in answer["bad"]]

    def _allowed(self) -> list[int]:
        """The steps that may be found: what had been committed decides."""
        old, new = ([] if self.scenario.first else [self.step]), self.step + 1
        if any(control.committed or control.returned for control in self.controls):
            return [new]
        if any(control.committing for control in self.controls) or not self.system.commit:
            return [*old, new] if old else [-1, new]
        return old or [-1]

    # ---- the judge, in a child ----

    def _seen(self, allowed: list[int]) -> dict[str, Any]:
        nothing = ""
        try:
            found = self.system.load(self.folder)
        except Nothing as error:
            found, nothing = -1, str(error)
        except Torn as error:
            return {"outcome": "torn", "bad": [f"torn: {error}"]}
        except BaseException as error:  # DCP's is no Exception
            return {"outcome": "damaged", "bad": [f"load raised {type(error).__name__}: {error}"]}
        allowed = sorted({*allowed, *self._allowed()})  # a rank that was not stopped may have committed meanwhile
        if nothing and -1 not in allowed:
            return {"outcome": "lost", "bad": [f"nothing was found: {nothing}"]}
        bad = [] if found in allowed else [f"step {found} was loaded, only {allowed} would be right"]
        return {"outcome": "new" if found > self.step else "old", "bad": bad}

    def _judge(self, allowed: list[int], valid_before: int) -> dict[str, Any]:
        answer = self._seen(allowed)
        answer["continues"] = False
        if self.scenario.keep and self.system.valid(self.folder) < min(self.scenario.keep, valid_before):
            answer["bad"].append(f"{self.system.valid(self.folder)} of {valid_before} checkpoints load")
        following = self.step + 2
        try:
            self.system.save(self.folder, following, _alone(self.scenario))
            found = self.system.load(self.folder)
            if found != following:
                answer["bad"].append(f"after the next save (step {following}) step {found} was loaded")
            answer["continues"] = found == following
        except BaseException:
            answer["bad"].append(f"the next save or load: {traceback.format_exc()}")
        left = self.system.leftovers(self.folder)
        if left:
            answer["bad"].append(f"left over after the next save: {left}")
            answer["continues"] = False
        return answer


def _alone(scenario: Scenario) -> Scenario:
    """The same save by one rank, synchronously, that keeps a few checkpoints at most."""
    keep = scenario.keep or (3 if "{step}" in scenario.tag else None)
    return Scenario(scenario.name, scenario.tag, keep=keep, io=scenario.io)


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
