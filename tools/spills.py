"""Count what inner loops of the aarch64 kernels keep on the stack for want of registers: `spills.py ASSEMBLY`.

A block of assembly with many multiply-adds is a tile's inner loop. There, a reference to the stack is a register that
was not there. Fails where there are any.
"""

import re
import sys
from pathlib import Path

LEAST = 12  # multiply-adds of a loop that counts
PRODUCT, LABEL, STACK = re.compile(r"\tfml[as]\t?"), re.compile(r"^[.\w$]+:"), re.compile(r"\[sp\b|\[x29\b")


def loops(text: str) -> dict[str, tuple[int, int]]:
    """Return, for each loop of products: multiply-adds and stack references."""
    found: dict[str, tuple[int, int]] = {}
    function, label, products, stack = "", "", 0, 0
    for line in text.splitlines():
        if LABEL.match(line) or line.startswith("\tb"):  # a block ends
            back = line.startswith("\tb") and label and line.rstrip().endswith(label)
            if back and products >= LEAST:
                found[f"{function} {label}"] = (products, stack)
            if LABEL.match(line):
                label = line.split(":")[0]
                function = label if label.startswith("_Z") else function
                products, stack = 0, 0
            continue
        products += bool(PRODUCT.match(line))
        stack += bool(STACK.search(line))
    return found


def main() -> int:
    found = loops(Path(sys.argv[1]).read_text())
    spilled = {name: counts for name, counts in found.items() if counts[1]}
    for name, (products, stack) in spilled.items():
        print(f"{name}: {stack} stack references for {products} multiply-adds")
    print(f"{len(found)} inner loops, {len(spilled)} of them short of registers")
    return 1 if spilled or not found else 0


if __name__ == "__main__":
    sys.exit(main())
