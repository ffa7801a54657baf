"""Compiles every kernel for GPUs that are not here: python triton_compile.py [--some] 80 90. No GPU and no interpreter needed."""

from __future__ import annotations

import itertools
import json
import sys
import traceback

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from bitatlas.kernels import triton_experts, triton_kv, triton_linear, triton_pack

INT = "i32"


def sources() -> dict[str, ASTSource]:
    """Name -> kernel with argument types; each width of the straddling and the dividing kind."""
    out = {}
    dtypes = ("bf16", "fp16", "fp32")
    for i, bits in enumerate((2, 3, 4, 5, 6, 8)):
        reach = 32 // bits + (0 if 32 % bits == 0 else 2)
        out[f"pack-{bits}"] = ASTSource(
            triton_pack.pack_kernel,
            {"codes": "*u8", "packed": "*u32", "rows": INT, "cols": INT, "words": INT},
            {"BITS": bits, "REACH": reach, "ROWS": 16, "WORDS": 64},
        )
        out[f"unpack-{bits}"] = ASTSource(
            triton_pack.unpack_kernel,
            {"packed": "*u32", "codes": "*u8", "rows": INT, "cols": INT, "words": INT},
            {"BITS": bits, "ROWS": 16, "COLS": 128},
        )
        buffers = {"codes": "*u32", "scales": "*fp16", "zeros": "*u32"}
        sizes = dict.fromkeys(("words", "group", "groups"), INT)
        for symmetric in (False, True):
            kind = f"{bits}-sym" if symmetric else str(bits)
            out[f"dequantize-{kind}"] = ASTSource(
                triton_linear.dequantize_kernel,
                {**buffers, "out": "*bf16", "rows": INT, "cols": INT, **sizes},
                {"BITS": bits, "SYMMETRIC": symmetric, "ROWS": 16, "COLS": 128},
            )
            for dtype in (dtypes[i % 3],) if symmetric else dtypes:
                out[f"linear-{kind}-{dtype}"] = ASTSource(
                    triton_linear.linear_kernel,
                    {"x": f"*{dtype}", **buffers, "out": "*fp32", "m": INT, "n": INT, "k": INT, **sizes, "chunk": INT},
                    {"BITS": bits, "SYMMETRIC": symmetric, "M": 16, "N": 64, "K": 32},
                )  # fmt: skip
    for dtype in dtypes:
        out[f"experts-{dtype}"] = ASTSource(
            triton_experts.grouped_kernel,
            {
                "x": f"*{dtype}",
                "source": "*i64",
                "tiles": "*i32",
                "table": "*i64",
                "out": f"*{dtype}",
                "n": INT,
                "k": INT,
            },
            {"M": 16, "N": 64, "K": 32},
        )
    counts = dict.fromkeys(("tokens", "dim", "n_words", "block"), INT)
    for bits in (2, 4, 8):
        for channel in (False, True):
            out[f"kv-pack-{bits}-{'channel' if channel else 'token'}"] = ASTSource(
                triton_kv.quantize_kv_kernel,
                {"x": "*bf16", "words": "*u32", "scale": "*fp16", "low": "*fp16", **counts},
                {"BITS": bits, "CHANNEL": channel, "T": 32, "D": 128},
            )
    packed = {
        f"{h}_{n}": "*u32" if n == "words" else "*fp16" for h in "kv" for n in ("words", "scale", "low")
    }
    lengths = dict.fromkeys(
        ("first", "tokens", "k_dim", "v_dim", "k_n", "v_n", "block", "group", "chunk", "splits"), INT
    )
    widths = itertools.cycle(itertools.product((2, 4, 8), repeat=2))
    for (axes, dtype), (k, v) in zip(
        itertools.product(("tt", "tc", "ct", "cc"), dtypes), widths, strict=False
    ):
        out[f"kv-decode-{k}-{v}-{axes}"] = ASTSource(
            triton_kv.decode_kernel,
            {
                "q": f"*{dtype}",
                **packed,
                "out": "*fp32",
                "top": "*fp32",
                "total": "*fp32",
                **lengths,
                "scaling": "fp32",
            },
            {
                "K_BITS": k,
                "K_CHANNEL": axes[0] == "c",
                "V_BITS": v,
                "V_CHANNEL": axes[1] == "c",
                "G": 16,
                "T": 32,
                "DK": 128,
                "DV": 128,
            },
        )
    return out


SOME = (
    "pack-3",
    "unpack-5",
    "dequantize-6",
    "linear-3-bf16",
    "linear-3-sym-fp16",
    "linear-4-fp16",
    "linear-5-sym-bf16",
    "experts-bf16",
    "kv-pack-4-channel",
    "kv-decode-8-4-ct",
    "kv-decode-4-8-tc",
)


def main(arguments: list[str]) -> None:
    names = SOME if "--some" in arguments else tuple(sources())
    results: dict[str, int | str] = {}
    for capability in (int(a) for a in arguments if a != "--some"):
        for name, source in sources().items():
            if name not in names:
                continue
            try:
                binary = compile_kernel(source, target=GPUTarget("cuda", capability, 32))
                results[f"sm_{capability} {name}"] = len(binary.asm["cubin"])
            except Exception:
                results[f"sm_{capability} {name}"] = traceback.format_exc(limit=-2)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
