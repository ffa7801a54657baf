from __future__ import annotations

import json

import pytest

from bitatlas.app.problems import describe, exit_code, guarded
from bitatlas.kernels.errors import UserError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("x"), 2),
        (OSError(28, "No space left"), 2),
        (PermissionError(13, "denied"), 2),
        (RuntimeError("bug"), 1),
    ],
)
def test_exit_codes(error: Exception, code: int, capsys: pytest.CaptureFixture[str]):
    @guarded
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == code == exit_code(error)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    assert shown.err.startswith("error: ")


def test_json_error_is_one_document(capsys: pytest.CaptureFixture[str]):
    @guarded
    def command(json_output: bool = False) -> None:
        raise UserError("wrong", found="this", fix="that")

    with pytest.raises(SystemExit):
        command(json_output=True)
    assert json.loads(capsys.readouterr().out) == {"error": "wrong", "found": "this", "fix": "that"}


def test_disk_full_says_so():
    assert describe(OSError(28, "No space left on device"))["error"] == "the disk is full"
