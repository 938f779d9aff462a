"""`python -m zs_comm.record [-m] script args...`: run a script or module, and leave word of how it failed.

A launcher that watches several ranks sees exit codes, often several at once. Each rank run this way writes
`$ZS_RECORD_DIR/rank<N>.json` when it fails: when, with which exit code, and the traceback. See `zs_comm.torchrun`.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

from .errors import CommError, RankDisagreement

FOLDER = "ZS_RECORD_DIR"


def main() -> None:
    """Run what `sys.argv` names. Exits as the script would."""
    as_module = sys.argv[1:2] == ["-m"]
    sys.argv = sys.argv[2 if as_module else 1 :]
    name = sys.argv[0]
    try:
        if as_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(name).resolve().parent)
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            code = end.code if isinstance(end.code, int) else 1
            _write(code, "" if isinstance(end.code, int) else f"SystemExit: {end.code}\n")
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        text = "".join(traceback.format_exception(type(error), error, _below_runpy(error.__traceback__)))
        # a peer that died is why this rank failed, not the other way round
        _write(1, text, consequence=isinstance(error, CommError | RankDisagreement))
        sys.stderr.write(text)
        sys.exit(1)


def _write(code: int, text: str, *, consequence: bool = False) -> None:
    folder = os.environ.get(FOLDER)
    if folder and Path(folder).is_dir():
        rank = os.environ.get("RANK", "0")
        report = {"time": time.time(), "code": code, "traceback": text, "consequence": consequence}
        file = Path(folder) / f"rank{rank}.json"
        file.with_suffix(".part").write_text(json.dumps(report))
        file.with_suffix(".part").rename(file)


def _below_runpy(frames: TracebackType | None) -> TracebackType | None:
    """The traceback from the script's own first line on."""
    outer = frames
    while frames is not None and frames.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        frames = frames.tb_next
    return frames or outer


if __name__ == "__main__":
    main()
