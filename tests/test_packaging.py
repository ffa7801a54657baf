"""Every folder with code is listed in pyproject, and a wheel installs bitatlas/ and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("app", "analysis", "solvers", "kernels", "cache")


def test_every_package_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {
        "bitatlas." + ".".join(p.parent.relative_to(ROOT).parts)
        for f in FOLDERS
        for p in (ROOT / f).rglob("*.py")
        if "__pycache__" not in p.parts
    }
    assert listed == on_disk


@pytest.mark.slow
def test_wheel_installs_only_bitatlas(tmp_path: Path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"bitatlas"}
    shipped = {n for n in names if n.endswith(".py")}
    expected = {
        f"bitatlas/{p.relative_to(ROOT).as_posix()}"
        for f in FOLDERS
        for p in (ROOT / f).rglob("*.py")
        if "__pycache__" not in p.parts
    }
    assert shipped == expected
    assert any(
        n.startswith("bitatlas/app/demo/shakespeare-moe/") and n.endswith(".safetensors") for n in names
    )
    assert "bitatlas/app/.streamlit/config.toml" in names


def test_every_source_file_is_tracked():
    run = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard", *FOLDERS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if run.returncode:
        pytest.skip("not a git checkout")
    assert [n for n in run.stdout.split() if n.endswith(".py")] == []
