"""Count the instructions that a kernel executes per tile of pairs, in the machine code that nvdisasm prints."""

import re
from collections import Counter

LINE = re.compile(r"^(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)(.*);", re.MULTILINE)
SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(\d+)")
TENSOR_CORES = ("HGMMA", "UTCHMMA", "HMMA")  # on sm_90, on sm_100, and on all GPUs for small tiles
EXPONENTIAL = "MUFU.EX2"


def instructions_per_tile(listing: str, d_steps: int) -> Counter[str]:
    """Count the instructions by opcode that a thread executes for a tile of pairs.

    They are those of the innermost loop with an exponential (the largest, if there are several), or all instructions if
    exponentials are computed outside of loops only. Loops inside are over D and take d_steps steps. Code that a
    conditional branch jumps over is left out if it contains neither exponentials nor products on tensor cores: it masks
    the last tile or the diagonal. A loop that the compiler unrolled is counted several times.
    """
    opcodes, branches = _parse(listing)

    def contains(start: int, end: int, *prefixes: str) -> bool:
        return any(opcode.startswith(prefixes) for opcode in opcodes[start:end])

    # A branch back over an EXIT comes from a block that the compiler moved to the end.
    loops = [(target, i + 1) for i, target, _ in branches if target < i and "EXIT" not in opcodes[target:i]]
    candidates = [loop for loop in loops if contains(*loop, EXPONENTIAL)]
    innermost = [x for x in candidates if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in candidates)]
    last_exit = max(i for i, opcode in enumerate(opcodes) if opcode == "EXIT")
    main = max(innermost, key=lambda loop: loop[1] - loop[0], default=(0, last_exit + 1))

    times = [0] * len(opcodes)
    times[slice(*main)] = [1] * (main[1] - main[0])
    for start, end in loops:
        if (start, end) != main and main[0] <= start and end <= main[1]:
            times[start:end] = [d_steps * count for count in times[start:end]]
    for i, target, conditional in branches:
        if conditional and main[0] <= i < target <= main[1] and not contains(i + 1, target, EXPONENTIAL, *TENSOR_CORES):
            times[i + 1 : target] = [0] * (target - i - 1)
    counts: Counter[str] = Counter()
    for opcode, count in zip(opcodes, times, strict=True):
        counts[opcode] += count
    return +counts


def _parse(listing: str) -> tuple[list[str], list[tuple[int, int, bool]]]:
    """Return all opcodes, and the index, the target and whether there is a condition of each branch."""
    opcodes, jumps, labels = [], [], {}
    for label, predicate, opcode, operands in LINE.findall(listing):
        if label:
            labels[label] = len(opcodes)
            continue
        if opcode.startswith("BRA") and (target := re.search(r"\.L_x_\d+", operands)):
            jumps.append((len(opcodes), target[0], bool(predicate) or "UP" in operands))
        opcodes.append(opcode)
    return opcodes, [(i, labels[target], conditional) for i, target, conditional in jumps]


def warp_flops(opcode: str) -> float:
    """Return the FLOPs of an HGMMA or HMMA instruction per warp; those of tf32 count twice, because they are slower."""
    shape = SHAPE.match(opcode)
    if shape is None:
        return 0
    m, n, k = (int(size) for size in shape.groups() if size)
    warps = 4 if opcode.startswith("HGMMA") else 1
    return 2 * m * n * k * (2 if "TF32" in opcode else 1) / warps
