"""What growth between two jobs costs: peak memory and time of `auxin grow`, beside copying the files that it writes.

    python benchmarks/grow_checkpoint.py [--depth 24] [--dim 576] [--vocab 16384] [--rounds 3]

A GPT with AdamW (both moments) and an average is saved. Each growth runs in a process of its own, one thread; its peak
is the VmHWM that the kernel keeps, which counts pages of files too, minus that of a process that imports torch and
nothing else. In turn with it all files of its result are copied in one process, each brought down to the disk as auxin
does; seconds do not count imports.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from gpt import GPT, train

import auxin as ax

EDITS = {
    "one block more": {"type": "Duplicate", "at": "blocks", "by": 1},
    "twice the blocks": {"type": "Duplicate", "at": "blocks"},
    "wider by a quarter": {"type": "Widen", "at": "blocks.*.up"},
}
GROW = """
import sys, time, json, torch
import auxin.between_jobs, torch._dynamo
from grow_checkpoint import build
begun = time.perf_counter(), time.process_time()
auxin.between_jobs.grow_checkpoint(sys.argv[1], sys.argv[2], build, json.loads(sys.argv[3]))
print(time.perf_counter() - begun[0], time.process_time() - begun[1])
"""
COPY = """
import os, sys, time
begun = time.perf_counter(), time.process_time()
os.makedirs(sys.argv[2])
for name in os.listdir(sys.argv[1]):
    with open(os.path.join(sys.argv[1], name), "rb") as old, open(os.path.join(sys.argv[2], name), "xb") as new:
        while part := old.read(8 << 20):
            new.write(part)
        new.flush()
        os.fsync(new.fileno())
print(time.perf_counter() - begun[0], time.process_time() - begun[1])
"""
TORCH = "import torch\nprint(0, 0)"
PEAK = "\nprint([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"


def build() -> ax.Grower:
    model = GPT(**json.loads(os.environ["SIZES"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    average = torch.optim.swa_utils.AveragedModel(model)
    ids = torch.randint(model.tokens.num_embeddings, (1, 16), generator=torch.Generator().manual_seed(0))
    words = {"edits": ax.Duplicate("blocks", by=1), "when": ax.when.every(1000), "probe": ids}
    return ax.Grower(model, optimizer, average, **words)


def measured(program: str, *words: str) -> tuple[float, float, float]:
    """Seconds on the clock and of the processor, and the peak in MiB, of a process."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", program + PEAK, *words]
    out = subprocess.run(command, env=own, check=True, capture_output=True, text=True).stdout
    clock, processor, peak = out.split()[-3:]
    return float(clock), float(processor), int(peak) / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("depth", 24), ("dim", 576), ("vocab", 16384), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    sizes = {"depth": options.depth, "dim": options.dim, "vocab": options.vocab, "heads": options.dim // 64}
    os.environ["SIZES"] = json.dumps(sizes)
    EDITS["wider by a quarter"]["by"] = options.dim
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in"), Path(folder, "out")
        grower = build()
        train(grower.model, grower.companions[0], grower.probe, 1)
        ax.save(grower, source)
        largest = max(p.nbytes for p in grower.model.parameters()) / 2**20
        count = sum(p.numel() for p in grower.model.parameters()) / 1e6
        del grower
        base = statistics.median(measured(TORCH)[2] for _ in range(3))
        size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file()) / 1e6
        print(f"torch {torch.__version__}; {count:.0f} M parameters, checkpoint {size:.0f} MB, its largest tensor")
        print(f"{largest:.0f} MiB; a process that imports torch peaks at {base:.0f} MiB; medians of {options.rounds}\n")
        print("| growth | writes MB | peak over torch, MiB | s | copying, s | speed of copying: clock | processor |")
        print("|---|---|---|---|---|---|---|")
        for name, edit in EDITS.items():
            rows = []
            for _ in range(options.rounds):
                grown, busy, peak = measured(GROW, str(source), str(target), json.dumps([edit]))
                written = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e6
                copied, copying, _ = measured(COPY, str(next(target.glob("checkpoint-*"))), f"{folder}/copy")
                rows.append((peak - base, grown, copied, copied / grown, copying / busy))
                shutil.rmtree(target)
                shutil.rmtree(f"{folder}/copy")
            peak, grown, copied, clock, processor = (statistics.median(column) for column in zip(*rows, strict=True))
            told = f"{peak:.0f} | {grown:.1f} | {copied:.1f} | {clock:.2f} | {processor:.2f}"
            print(f"| {name} | {written:.0f} | {told} |", flush=True)


if __name__ == "__main__":
    main()
