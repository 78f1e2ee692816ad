"""The measurements, run by pytest-benchmark under ``python -m benchmarks.bench``; ``make test`` collects none of them.

One round of a benchmark is one turn of every contender, so that pytest-benchmark's own figures are of whole rounds;
what each contender took is in ``extra_info`` and becomes the results. ``plan`` comes from ``suite``.
"""
