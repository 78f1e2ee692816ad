"""Who is measured: the same outer step written in four ways, all driven alike.

Every contender has ``evaluations()``: one outer step, a generator that yields wherever it wants gradients in
``p.grad``. What runs between two yields is its own work. All clear the gradients before they yield, and all use SGD
with momentum and weight decay as the base optimizer. ``naive`` takes 2k gradients and an adaptive alpha for each
tensor, as the public code does; the others take k + 1.
"""

from benchmarks.bench.contenders.compiled import Compiled
from benchmarks.bench.contenders.foreach import Foreach
from benchmarks.bench.contenders.fused import Fused, OpsAlone
from benchmarks.bench.contenders.naive import Naive

CONTENDERS = {"naive": Naive, "foreach": Foreach, "compiled": Compiled, "native": Fused}
"""Those that are compared with each other."""
ALL = {**CONTENDERS, "ops": OpsAlone}
