"""The jobs, a folder each: train, compare, bench, distributed. Beside the folders is what they share; none imports from
another's.

No part of the installed package.
"""
