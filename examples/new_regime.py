"""Summer comes, and the demand for electricity follows other rules: grow, train anew, or go on as before?

    python examples/new_regime.py    # needs the extra "examples"; --quick: hardly trained, means nothing

Each midnight a network forecasts the next 24 hours, and then learns from them and from all the days before; the trigger
`ax.when.drift` watches its errors. All ways spend the same training FLOPs, with settings chosen on the winter before.
"""

import sys
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from electricity import DAY, forecaster, load

import auxin as ax

BATCH, LARGE, FLOPS = 64, 3, 100e6  # windows; blocks; of training, a day
DRIFT = {"threshold": 4.0, "delta": 2.0}


@dataclass(frozen=True)
class Way:
    name: str
    blocks: int = 1
    at_drift: str = "go on"  # or "train more", "train anew", "grow"
    lr: float = 1e-3
    burst: float = 0.0  # part of the FLOPs still left that is spent at once at the drift


WAYS = [
    Way("1 block"),
    Way("3 blocks", blocks=LARGE, lr=2e-3),
    Way("1 block, trained more at the drift", at_drift="train more", burst=0.2),
    Way("1 block, at the drift 3 trained anew", at_drift="train anew", lr=4e-3, burst=0.6),
    Way("1 block, at the drift grown to 3", at_drift="grow", burst=0.2),
]


def build(way, blocks):
    model = forecaster(blocks)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    return model, torch.optim.AdamW(model.parameters(), lr=way.lr), ema


def live(way, data, seed, nights, when, flops=FLOPS):
    """Go through the nights; returns their errors, the night of the drift, and errors on held-out days of the old."""
    torch.manual_seed(seed)
    model, opt, ema = build(way, way.blocks)
    grower = ax.Grower(model, opt, ema, edits=ax.Duplicate("2", by=LARGE - 1), when=when, probe=data.known[:BATCH])
    errors, drift, old, budget = [], None, None, 0.0
    for night, now in enumerate(nights):
        errors.append(error(ema, data, [now]))
        old = error(ema, data, data.held) if night == data.summer else old
        if drift is None and (decision := grower.decide(errors[-1])):
            drift = night
            if way.at_drift == "grow":
                grower.grow(*decision)
            elif way.at_drift == "train anew":
                model, opt, ema = build(way, LARGE)
            budget += way.burst * flops * (len(nights) - night)
            flops *= 1 - way.burst
        budget += flops
        seen = data.trained[data.trained <= now]  # a batch: half of all days so far, half of the last four weeks
        while budget > 0:
            some = torch.cat([pool[torch.randint(len(pool), (BATCH // 2,))] for pool in (seen, seen[-28 * DAY :])])
            (model(data.known[some]) - data.demand[some]).abs().mean().backward()
            opt.step()
            opt.zero_grad()
            ema.update_parameters(model)
            budget -= 6 * BATCH * sum(p.numel() for p in model.parameters() if p.dim() > 1)
    return errors, drift, old, error(ema, data, data.held)


@torch.no_grad()
def error(model, data, nights):
    return 1000 * (model(data.known[nights]) - data.demand[nights]).abs().mean().item()  # megawatts


def row(way, data, seeds, flops, drift=DRIFT):
    runs = [live(way, data, seed, data.nights, ax.when.drift(**drift), flops) for seed in seeds]
    whole = [mean(errors[data.summer :]) for errors, *_ in runs]
    after = [mean(errors[max(night or 0, data.summer) + 1 :]) for errors, night, *_ in runs]
    summer = " ".join(f"{mean(values):4.0f} +- {stdev(values):<6.0f}" for values in (whole, after))
    old = f"{mean(run[2] for run in runs):4.0f} -> {mean(run[3] for run in runs):<6.0f}"
    return f"{way.name:<38}{summer}{old}{[run[1] for run in runs]}"


def main(seeds, flops):
    data = load()
    print("Mean absolute error, MW: the summer, and from the night after the drift; days before the summer that were")
    print(
        f"never trained on, at its beginning -> its end; the night of the drift (the summer begins with {data.summer})"
    )
    for way in WAYS:
        print(row(way, data, seeds, flops), flush=True)


if __name__ == "__main__":
    main(*(range(2), FLOPS / 30) if "--quick" in sys.argv else (range(5), FLOPS))
