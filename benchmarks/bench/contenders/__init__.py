"""Who is measured: the same outer step written in several ways, all driven alike.

Every contender has ``evaluations()``: one outer step, a generator that yields wherever it wants gradients in
``p.grad``. What runs between two yields is its own work. All clear the gradients before they yield, and all use SGD
with momentum and weight decay as the base optimizer. ``naive`` and ``public`` take 2k gradients and an adaptive alpha
for each tensor, as public code does; the others take k + 1.
"""

from benchmarks.bench.contenders.compiled import Compiled
from benchmarks.bench.contenders.foreach import Foreach, ForeachOnDevice
from benchmarks.bench.contenders.fused import Fused, OpsAlone, Pair
from benchmarks.bench.contenders.naive import Naive
from benchmarks.bench.contenders.public import Port, Public

CONTENDERS = {"naive": Naive, "public": Public, "foreach": Foreach, "compiled": Compiled, "native": Fused}
"""Those that are compared with each other."""
PAIRS = {"port": Port, "pair": Pair}
"""SAM, with whose two halves scripts drive it."""
ALL = {**CONTENDERS, **PAIRS, "ops": OpsAlone, "foreach on the device": ForeachOnDevice}
