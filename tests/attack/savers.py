"""Runs that grow, fade in, warm up and save again and again to one path at once.

`savers.py FOLDER SECONDS KEEP` lets two processes save there while this one loads.
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ramp"))
import bert

import auxin as ax

STEPS, AFTER, LOADS = 4, 3, 3


def life(folder, who=0, keep_last=2):
    """One run from its beginning: two growths, the second while the first fades in, and a save after every step."""
    run = bert.Run(rewarm=3)
    for number in range(1, STEPS + 1):
        run.train(1)
        if number in (1, 3):
            run.grower.grow(run.edit)
        ax.save(run.grower, folder, extra={"step": number, "who": who}, keep_last=keep_last)
        yield number


def resumed(folder):
    """What was saved there, and the losses from there on."""
    run = bert.Run(rewarm=3)
    extra = ax.load(folder, run.grower)
    run.grower.verify()
    return extra, run.train(AFTER)


def child(act):
    """Fork; the child does ``act`` and ends."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        act()
        code = 0
    finally:
        os._exit(code)


def both(folder, seconds, keep):
    """Two processes save to one path, this one loads from there until it has LOADS, or for ten times as long."""
    begun, stop = time.monotonic(), folder.parent / "stop"

    def writer(who):
        while not stop.exists() and time.monotonic() < begun + 20 * seconds:
            for _ in life(folder, who, keep):
                pass

    children = [child(lambda who=who: writer(who)) for who in (1, 2)]
    while not list(folder.glob("checkpoint-*")):
        time.sleep(0.05)
    seen, missed = Counter(), 0
    while (spent := time.monotonic() - begun) < seconds or (sum(seen.values()) < LOADS and spent < 10 * seconds):
        try:
            seen[resumed(folder)[0]["who"]] += 1
        except ax.GrowthError as error:
            if "was removed while it was read" not in str(error):
                raise
            missed += 1
    stop.touch()
    codes = [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in children]
    extra, _ = resumed(folder)
    return {"codes": codes, "seen": seen, "missed": missed, "last": extra, "names": sorted(os.listdir(folder))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(both(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))))
