"""The store: DuckDB results, content keys, artifacts. Imports `analysis.schema` only, and no torch."""
