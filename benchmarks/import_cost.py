"""How much does `import auxin` cost on top of `import torch`? CPU time, interleaved pairs, the median of 15."""

import compileall
import statistics
import subprocess
import sys
from pathlib import Path

ROUNDS = 15
CLOCK = "from time import process_time as t; a = t(); {imports}; print(t() - a)"


def seconds(imports: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", CLOCK.format(imports=imports)], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def main() -> None:
    compileall.compile_dir(Path(__file__).parents[1] / "src", quiet=1)  # as pip does when it installs a wheel
    seconds("import torch, auxin")  # fills the file cache
    pairs = [(seconds("import torch"), seconds("import torch, auxin")) for _ in range(ROUNDS)]
    torch_only, both = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"import torch {torch_only:.3f} s, with auxin {both:.3f} s")
    print(f"ratio of medians {both / torch_only:.3f}, median of ratios {ratio:.3f}")


if __name__ == "__main__":
    main()
