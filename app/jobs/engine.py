"""The engine: the process that computes one job. ``python -m bitatlas.app.jobs.engine``, started by the worker.

Talks JSON lines: requests on stdin, answers on what was stdout at the start; then stdout and stderr of the work
are the job's log. It dies with the worker, and killing it is how a job is cancelled and its memory freed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

from bitatlas.analysis.schema import UserError
from bitatlas.app.jobs.gpu import claim_gpu, visible_gpus
from bitatlas.app.jobs.lifeline import die_with
from bitatlas.app.jobs.settings import parallel_jobs
from bitatlas.app.jobs.work import Work, load_work
from bitatlas.app.problems import EXIT_USER, describe, exit_code
from bitatlas.cache.paths import Home

__all__ = ["main"]


def _answer(out: TextIO, reply: dict[str, Any]) -> None:
    out.write(json.dumps(reply) + "\n")
    out.flush()


def _handle(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "run":
        return work.run(request["key"])
    if request["do"] == "finish":
        return work.finish()
    return _opened(work)


def _opened(work: Work) -> dict[str, Any]:
    return {"steps": work.plan(), "weights": work.weights(), "runs": work.runs()}


def _serve(kind: str, home: Home, requests: TextIO, out: TextIO) -> None:
    work: Work | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if work is None:
                work = load_work(kind, request["params"], home)
                work._report = lambda note, fraction: _answer(out, {"progress": [note, fraction]})
                opened = _opened(work)
            reply = opened if request["do"] == "plan" else _handle(work, request)
            # Made here, so that something JSON cannot carry is this step's error and not a broken pipe.
            text = json.dumps({"ok": reply})
        except UserError as e:
            text = json.dumps({"error": str(e), "user": e.to_dict()})
        except MemoryError:
            traceback.print_exc()
            text = json.dumps({"error": "The job ran out of memory. Try: fewer tokens, or a smaller batch."})
        except OSError as e:
            traceback.print_exc()
            words = describe(e)
            reply = {"error": " ".join(filter(None, (words["error"] + ".", words["found"], words["fix"])))}
            text = json.dumps({**reply, "user": words} if exit_code(e) == EXIT_USER else reply)
        except Exception as e:  # noqa: BLE001 - whatever the work raises is reported, with its trace in the log
            traceback.print_exc()
            text = json.dumps({"error": f"{type(e).__name__}: {e} (the log has the whole story)"})
        sys.stderr.flush()
        out.write(text + "\n")
        out.flush()


def main(argv: list[str] | None = None) -> int:
    """Entry point of the engine process."""
    parser = argparse.ArgumentParser(prog="python -m bitatlas.app.jobs.engine")
    parser.add_argument("--home", required=True)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args(argv)
    die_with(args.parent)
    # Answers keep the pipe to themselves; prints of the work and of its libraries go to the log.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    home = Home(Path(args.home))
    if parallel_jobs() > 1:
        claim_gpu(home, visible_gpus())
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        _serve(args.kind, home, sys.stdin, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
