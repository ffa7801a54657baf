"""From an exception to what a person reads: one text for the command line, the job log and the pages."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from bitatlas.kernels.errors import UserError

__all__ = ["EXIT_FAULT", "EXIT_USER", "describe", "exit_code", "guarded"]

EXIT_USER = 2
EXIT_FAULT = 1

F = TypeVar("F", bound=Callable[..., Any])


def describe(error: BaseException) -> dict[str, str]:
    """``error``, ``found``, ``fix`` of any exception; the operating system's own words become ours."""
    if isinstance(error, UserError):
        return error.to_dict()
    if isinstance(error, OSError) and error.errno == 28:
        return {"error": "the disk is full", "found": str(error), "fix": "free some space and resume the job"}
    if isinstance(error, PermissionError | OSError) and error.errno in (13, 30):
        return {
            "error": "the folder cannot be written",
            "found": str(error),
            "fix": "name another folder, or change its permissions",
        }
    return {
        "error": f"{type(error).__name__}: {error}",
        "found": "",
        "fix": "this is our fault; please report it",
    }


def exit_code(error: BaseException) -> int:
    """2 for what the user can mend (input, permissions, disk), 1 for our faults."""
    if isinstance(error, UserError):
        return EXIT_USER
    if isinstance(error, OSError) and error.errno in (13, 28, 30):
        return EXIT_USER
    return EXIT_FAULT


def guarded(function: F) -> F:
    """Command wrapper: errors become one clear message and the right exit code, a traceback only with BITATLAS_DEBUG."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:  # noqa: BLE001 - the last line of defence of the command line
            if os.environ.get("BITATLAS_DEBUG"):
                traceback.print_exc()
            words = describe(error)
            if kwargs.get("json_output"):
                print(json.dumps(words))
            else:
                print(f"error: {words['error'].rstrip('.')}.", file=sys.stderr)
                if words["found"]:
                    print(f"found: {words['found']}", file=sys.stderr)
                if words["fix"]:
                    print(f"hint:  {words['fix']}", file=sys.stderr)
            raise SystemExit(exit_code(error)) from None

    return run  # type: ignore[return-value]
