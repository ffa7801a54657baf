"""The walls of the house, and what may not be loaded where."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("app", "analysis", "solvers", "kernels", "cache")


def sources(*folders: str) -> list[Path]:
    return [p for f in folders for p in sorted((ROOT / f).rglob("*.py")) if "__pycache__" not in p.parts]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("statement", ["import bitatlas.solvers", "import bitatlas.cache", "import bitatlas.analysis.schema",
                                       "import bitatlas.app.cli"])  # fmt: skip
def test_import_loads_no_torch(statement: str):
    code = f"{statement}\nimport sys\nprint([m for m in ('torch', 'transformers', 'streamlit') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("folder", ["solvers", "cache"])
def test_solvers_and_cache_know_only_the_nouns(folder: str):
    allowed = ("bitatlas.analysis.schema", f"bitatlas.{folder}")
    for path in sources(folder):
        ours = {n for n in imports(path) if n.startswith("bitatlas")}
        assert all(n.startswith(allowed) for n in ours), f"{path}: {sorted(ours)}"


def test_kernels_folder_has_no_init():
    # A regular package of that name exists and is imported by transformers; ours must not shadow it.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_module_of_app_shadows_another():
    taken = set(sys.stdlib_module_names) | {
        "plotly",
        "streamlit",
        "torch",
        "duckdb",
        "pandas",
        "numpy",
        "dbos",
        "typer",
        "rich",
    }
    clash = {p.stem for p in (ROOT / "app").glob("*.py")} & taken
    assert not clash, f"streamlit puts app/ on sys.path; rename {clash}"


def test_files_are_short():
    lengths = sorted(len(p.read_text().splitlines()) for p in sources(*FOLDERS) if p.name != "__init__.py")
    assert lengths[-1] <= 450
    assert lengths[len(lengths) // 2] <= 130


def test_no_pickle_and_no_remote_code():
    for path in sources(*FOLDERS, "examples", "benchmarks"):
        assert not imports(path) & {"pickle", "dill", "cloudpickle", "joblib"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) != "torch.load", path
                assert all(
                    k.arg != "trust_remote_code" or ast.unparse(k.value) == "False" for k in node.keywords
                ), path
