"""The main job (`python -m benchmarks.train`) and the measurements. No part of the installed package."""
