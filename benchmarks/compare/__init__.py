"""The comparison: every method, each tuned, on several seeds; `python -m benchmarks.compare`."""
