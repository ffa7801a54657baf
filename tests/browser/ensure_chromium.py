"""Before the browser tests: install Debian's Chromium when it is missing and that is possible; else say so loudly.

Always ends with 0: without a browser the other tests still run, and the browser tests report themselves as skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def find() -> str | None:
    """The browser's path, None when there is none."""
    return os.environ.get("BITATLAS_CHROMIUM") or next((p for p in map(shutil.which, NAMES) if p), None)


def main() -> int:
    """Install it if need be."""
    if find():
        print(f"browser tests will use {find()}")
        return 0
    why = ""
    if not shutil.which("apt-get"):
        why = "this system has no apt-get"
    elif os.geteuid() != 0:
        why = "installing needs root"
    else:
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "update", "-q"],
            ["apt-get", "install", "-q", "-y", "--no-install-recommends", "chromium"],
        ):
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                why = f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-300:]}"
                break
    if find():
        print(f"browser tests will use {find()}")
        return 0
    bar = "!" * 78
    print(f"{bar}\nNO BROWSER: the browser tests will be SKIPPED ({why or 'chromium is not in the package index'}).\n"
          f"Install chromium, or name one in BITATLAS_CHROMIUM.\n{bar}", file=sys.stderr)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
