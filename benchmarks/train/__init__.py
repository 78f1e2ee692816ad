"""The main job: several methods train the same network on the same images; `python -m benchmarks.train`."""
