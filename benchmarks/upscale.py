"""What depth up-scaling on disk costs: peak resident memory and time, beside mergekit's passthrough.

    python benchmarks/upscale.py [--mb 500] [--mergekit PYTHON]

A random Llama checkpoint in four shards is written to a temporary directory. Each program runs in a process of its own,
one thread; its peak is the VmHWM that the kernel keeps. "Over the interpreter": minus the peak of a process that only
imports what the program imports (auxin, torch, and where a block is opened transformers with the model's class).
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

PEAK = "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
IMPORTS = "import auxin.cli, auxin.upscale"
OPENING = f"{IMPORTS}; import transformers; transformers.LlamaForCausalLM"
OURS = "from auxin.upscale import upscale; upscale(sys.argv[1], sys.argv[2], order={order}, output={output!r})"
THEIRS = """
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
import transformers; transformers.LlamaForCausalLM
# then
options = MergeOptions(out_shard_size=int(sys.argv[4]), lazy_unpickle=False, quiet=True, write_model_card=False)
run_merge(MergeConfiguration.model_validate(json.load(open(sys.argv[3]))), sys.argv[2], options=options)
"""
ROUNDS = 3
ORDER = [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7]  # 8 blocks become 12


def checkpoint(path: Path, megabytes: float) -> tuple[float, float]:
    """Write one of 8 blocks in bfloat16; megabytes of its largest shard and of one block."""
    import transformers

    wide = int((megabytes * 1e6 / 2 / (8 * 12 + 2 * 8)) ** 0.5) // 64 * 64
    config = transformers.LlamaConfig(
        hidden_size=wide,
        intermediate_size=8 * wide // 3,
        num_hidden_layers=8,
        num_attention_heads=wide // 64,
        vocab_size=8 * wide,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    names, places, sizes = list(shapes), {}, []
    for i in range(4):
        file = f"model-{i + 1:05}-of-00004.safetensors"
        part = {n: 0.02 * torch.randn(shapes[n], dtype=torch.bfloat16) for n in names if place(n) == i}
        sizes.append(sum(t.nbytes for t in part.values()) / 1e6)
        save_file(part, path / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    block = sum(2 * shape.numel() for n, shape in shapes.items() if n.startswith("model.layers.0.")) / 1e6
    return max(sizes), block


def place(name: str) -> int:
    """Shards of two blocks; the embedding with the first, the head with the last."""
    parts = name.split(".")
    return int(parts[2]) // 2 if "layers" in parts else 0 if "embed" in name else 3


def measured(python: str, imports: str, call: str, *arguments: str) -> tuple[float, float]:
    """Peak resident megabytes of a process, and seconds of the call in it."""
    program = (
        f"import sys, json, time\n{imports}\nbegun = time.perf_counter()\n{call}\nprint(time.perf_counter() - begun)"
    )
    done = subprocess.run(
        [python, "-c", f"{program}\n{PEAK}", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, peak = done.stdout.split()[-2:]
    return int(peak) * 1024 / 1e6, float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=float, default=500)
    parser.add_argument("--mergekit", help="a Python that has mergekit")
    options = parser.parse_args()
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "transformers", "safetensors"))
    print(f"{versions}; one thread; times are medians of {ROUNDS} rounds in turn")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in", Path(folder) / "out"
        shard, block = checkpoint(source, options.mb)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e6
        print(f"{size:.0f} MB in 4 shards, the largest {shard:.0f} MB, a block {block:.0f} MB; 8 blocks become 12\n")
        bare, plain = (measured(sys.executable, imports, "pass")[0] for imports in ("", IMPORTS))
        opening = measured(sys.executable, OPENING, "pass")[0]
        print(
            f"interpreter alone {bare:.0f} MB, with auxin and torch {plain:.0f} MB, with transformers {opening:.0f} MB"
        )
        print(f"allowed over the interpreter: shard + block + 300 = {shard + block + 300:.0f} MB\n")
        ours = (sys.executable, OPENING)
        given = [str(source), str(target)]
        runs = {
            f"auxin upscale --output {output}": (*ours, OURS.format(order=ORDER, output=output), *given)
            for output in ("keep", "zero")
        }
        bases = dict.fromkeys(runs, opening)
        if options.mergekit:
            slices = [{"sources": [{"model": str(source), "layer_range": [i, i + 1]}]} for i in ORDER]
            recipe = Path(folder) / "recipe.json"
            recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
            name, (imports, call) = "mergekit passthrough", THEIRS.split("# then\n")
            runs[name] = (options.mergekit, imports, call, *given, str(recipe), str(int(shard * 1e6)))
            bases[name] = measured(options.mergekit, imports, "pass")[0]
        found = {name: [] for name in runs}
        for name, run in [*runs.items()] * ROUNDS:
            shutil.rmtree(target, ignore_errors=True)
            found[name].append(measured(*run))
        print("| program | peak MB | over what it imports | over auxin and torch | over Python alone | s |")
        print("|---|---|---|---|---|---|")
        for name, pairs in found.items():
            peak, seconds = max(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)
            over = " | ".join(f"{peak - base:.0f}" for base in (bases[name], plain, bare))
            print(f"| {name} | {peak:.0f} | {over} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
