"""What a step over several processes sends and waits for, on a slow link; `python -m benchmarks.distributed`."""
