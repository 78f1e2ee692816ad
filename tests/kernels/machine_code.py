"""NVIDIA's machine code, as nvdisasm prints it: which loads are under way together."""

import re
import subprocess
from pathlib import Path

REGISTERS = {"128": 4, "64": 2}  # that an access of so many bits fills
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def disassembled(cubin: Path) -> dict[str, str]:
    """The machine code of each kernel."""
    from gpusim.aot import NVBIN

    command = [f"{NVBIN}/nvdisasm", "-c", str(cubin)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", printed, re.DOTALL | re.MULTILINE))


def loads_under_way(code: str, bits: int = 128) -> int:
    """The most loads from global memory of at least so many bits that are issued one after the other before what one of
    them loads is used or anything is stored.

    Instructions are taken in the order in which they stand: what is loaded to the same registers, in two branches or
    under two conditions, counts once.
    """
    under_way: dict[int, int] = {}  # registers, by the first
    most = 0
    for operation, operands in INSTRUCTION.findall(code):
        name, *suffixes = operation.split(".")
        to, _, others = operands.partition(",")
        loads = name == "LDG"
        used = registers(others if loads else operands)
        if name == "STG" or any(first <= r < first + n for r in used for first, n in under_way.items()):
            under_way.clear()
        if loads:
            under_way[registers(to)[0]] = next((REGISTERS[s] for s in suffixes if s in REGISTERS), 1)
            most = max(most, sum(32 * n >= bits for n in under_way.values()))
    return most


def registers(operands: str) -> list[int]:
    """The numbers of those that are named; of several in a row the first is."""
    return [int(number) for number in re.findall(r"\bR(\d+)", operands)]
