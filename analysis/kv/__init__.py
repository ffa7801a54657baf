"""The KV cache of a loaded model: watched, differentiated, and read as if it were quantised."""
