"""Kill a run again and again, start it again with the same call, and compare each of its losses, bit by bit.

`kills.py FOLDER COUNT SEED` forks children from this warm process, one after the other, and kills COUNT of them (more,
until each part was met often enough), each at a random moment of a random part of its life. What they did, and where
death met them, they note in memory that outlives them.
"""

import json
import math
import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import shuffled
import torch
from shuffled import AFTER, SAVE_EVERY, STEPS

from auxin.checkpoint import directory

PARTS = ("elsewhere", "grow", "save", "load")


class Board:
    """Where a child stands, in memory that its parent sees: doubles, of which each is written at one stroke."""

    def __init__(self):
        self.numbers = memoryview(mmap.mmap(-1, 8 * (8 + 2 * STEPS))).cast("d")
        self.clear()

    def clear(self):
        for place in range(len(self.numbers)):
            self.numbers[place] = 0.0 if place < 8 else math.nan

    @property
    def part(self):
        """The part of its life in which the child is, or was killed."""
        return PARTS[int(self.numbers[0])]

    def times(self, part):
        """How often it has begun that part."""
        return self.numbers[1 + PARTS.index(part)]

    def enter(self, part):
        self.numbers[1 + PARTS.index(part)] += 1
        self.numbers[0] = PARTS.index(part)

    def during(self, part, act):
        """``act``, noted."""

        def noted(*words):
            self.enter(part)
            try:
                return act(*words)
            finally:
                self.enter("elsewhere")

        return noted

    def note(self, step, losses):
        self.numbers[6 + 2 * step], self.numbers[7 + 2 * step] = losses

    def losses(self):
        """Step -> losses, of every step that was made."""
        pairs = zip(self.numbers[8::2], self.numbers[9::2], strict=True)
        return {step: pair for step, pair in enumerate(pairs, start=1) if not math.isnan(pair[1])}


def live(folder, board):
    """Go on from what lies in ``folder``, or begin; save as it goes."""
    run = shuffled.Run()
    run.grower.grow = board.during("grow", run.grower.grow)
    save = board.during("save", run.save)
    board.during("load", run.load)(folder)
    for losses in run.train(STEPS):
        board.note(run.steps, losses)
        if run.steps % SAVE_EVERY == 0:
            save(folder)


def child(act, *words):
    """Fork; the child does ``act`` and ends."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        act(*words)
        code = 0
    finally:
        os._exit(code)


def killed(folder, board, generator, seconds):
    """One life; whether it was killed before its end."""
    board.clear()
    part = generator.choice(PARTS)
    nth = 1 if part == "load" else generator.randint(1, 3)
    late = generator.uniform(0.0, seconds[part])
    number = child(live, folder, board)
    while board.times(part) < nth and os.waitpid(number, os.WNOHANG) == (0, 0):
        time.sleep(1e-4)
    if board.times(part) < nth:
        return False
    time.sleep(late)
    os.kill(number, signal.SIGKILL)
    status = os.waitpid(number, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), status
    return os.waitstatus_to_exitcode(status) != 0


def check(folder, board, whole):
    """Each loss that was seen, each checkpoint, and how the newest goes on; its step, or 0 where there is none."""
    assert all(whole[step - 1] == pair for step, pair in board.losses().items())
    found = sorted(Path(folder).glob("checkpoint-*"))
    for checkpoint in found:
        directory.read(checkpoint)
    run = shuffled.Run()
    run.load(folder)
    begun = run.steps
    assert list(run.train(begun + AFTER)) == whole[begun : begun + AFTER], begun
    assert bool(found) == bool(begun) and begun % SAVE_EVERY == 0
    return begun


def durations(folder):
    """Seconds that each part takes at a time; the run as it is without a kill."""
    run, spent, counts = shuffled.Run(), Counter(), Counter()

    def timed(part, act, *words):
        began = time.perf_counter()
        result = act(*words)
        spent[part] += time.perf_counter() - began
        counts[part] += 1
        return result

    grow = run.grower.grow
    run.grower.grow = lambda *words: timed("grow", grow, *words)
    began, losses = time.perf_counter(), []
    for pair in run.train(STEPS + AFTER):
        losses.append(pair)
        if run.steps % SAVE_EVERY == 0:
            timed("save", run.save, folder)
    spent["elsewhere"] = time.perf_counter() - began - spent["grow"] - spent["save"]
    counts["elsewhere"] = counts["grow"] + counts["save"]
    timed("load", shuffled.Run().load, folder)
    return losses, {part: spent[part] / counts[part] for part in PARTS}


def rare(where, count):
    """Whether some part of a life was met less often than 15 times in a hundred; a busy machine shifts the moments."""
    return any(where[part] < 0.15 * count for part in ("elsewhere", "grow", "save"))


def main(folder, count, seed):
    durations(folder / "warm")  # the first time everything takes longer
    whole, seconds = durations(folder / "whole")
    board, generator, run = Board(), random.Random(seed), folder / "run"
    where, steps, ended, cut, blank = Counter(), Counter(), 0, 0, 0
    while sum(where.values()) < count or (rare(where, count) and sum(where.values()) < 2 * count):
        if killed(run, board, generator, seconds):
            where[board.part] += 1
            cut += any(run.glob(".tmp-*"))
            step = check(run, board, whole)
            steps[step] += 1
            blank += step == 0
        else:
            assert board.part == "elsewhere"
            assert check(run, board, whole) == STEPS
            shutil.rmtree(run)
            ended += 1
    print(json.dumps({"where": where, "steps": len(steps), "ended": ended, "cut": cut, "blank": blank}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
