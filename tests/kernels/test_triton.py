"""Triton kernels: run in the interpreter, compiled for GPUs that are not here, and run on a GPU when there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_cases

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton on this platform"
)


def script(name: str, *arguments: str, interpret: bool) -> dict[str, float | str]:
    """Output of a script in a process of its own: interpreted or not is decided when triton is imported."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, str(HERE / name), *arguments], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def interpreted() -> dict[str, float | str]:
    return script("triton_cases.py", "cpu", interpret=True)


@pytest.mark.xdist_group("triton")
@pytest.mark.parametrize("case", triton_cases.cases("cpu"))
def test_interpreted_equals_the_reference(case: str, interpreted: dict[str, float | str]) -> None:
    assert not isinstance(interpreted[case], str), interpreted[case]
    assert interpreted[case] <= triton_cases.limit(case)


def test_kernels_compile_for_ampere_and_hopper() -> None:
    sizes = script("triton_compile.py", "--some", "80", "90", interpret=False)
    assert len(sizes) == 2 * 11
    assert not {name: words for name, words in sizes.items() if isinstance(words, str)}


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_width_and_dtype_compiles(capability: str) -> None:
    sizes = script("triton_compile.py", capability, interpret=False)
    # un/pack, dequantise and linear by width; experts; K/V packing; decoding
    assert len(sizes) == 6 * (2 + 2 + 3 + 1) + 3 + 6 + 12
    assert not {name: words for name, words in sizes.items() if isinstance(words, str)}


def test_importing_the_kernels_touches_no_gpu_and_packed_imports_no_triton() -> None:
    code = (
        "import sys, torch\n"
        "import bitatlas.kernels.packed.modules\n"
        "assert not any(m.startswith('bitatlas.kernels.triton') for m in sys.modules)\n"
        "import bitatlas.kernels.triton_linear, bitatlas.kernels.triton_experts, bitatlas.kernels.triton_pack, bitatlas.kernels.triton_kv\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", triton_cases.cases("cuda"))
def test_on_a_gpu(case: str) -> None:
    assert triton_cases.cases("cuda")[case]() <= max(triton_cases.limit(case), 1e-6)
