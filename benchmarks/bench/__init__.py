"""The benchmark: every bound of the design with its measured value; `python -m benchmarks.bench`."""
