"""The quantised KV cache: formats and their bytes (torch-free), the reference quantiser, the cache for transformers."""

from bitatlas.kernels.kv.formats import (
    KV16,
    KV_FORMATS,
    KvFormat,
    KvLayout,
    KvPair,
    parse_kv_format,
    parse_pair,
)

__all__ = ["KV16", "KV_FORMATS", "KvFormat", "KvLayout", "KvPair", "parse_kv_format", "parse_pair"]
