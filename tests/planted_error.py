"""Plants a type error in a copy of the checkers' view and insists that mypy finds it: the check cannot go green unseen."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as scratch:
        planted = Path(scratch) / "planted.py"
        planted.write_text(
            "from bitatlas.kernels.formats import parse_format\n\n"
            "from bitatlas.solvers import SOLVERS\n\n\n"
            "def wrong() -> str:\n    return parse_format('int4-g64').bits\n"
        )
        run = subprocess.run(
            [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), str(planted)],
            cwd=root, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if 'got "int", expected "str"' not in run.stdout:
        print("mypy did not find a planted type error; it checks nothing:\n" + run.stdout + run.stderr)
        return 1
    print("planted type error found: the checker sees the code")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
