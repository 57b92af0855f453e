"""What hangs on a network and must keep step with it: one follower per kind of companion, found by its type.

A follower is a generator ``f(companion, change)`` that yields twice. Before its first ``yield`` it checks, and may
raise: nothing has been touched yet. Between the two it changes the companion. At the second it waits for the growth
to be proved: what is thrown into it there makes it take its change back.

    @auxin.follow(MyAverage)
    def follow_my_average(average, change):
        check(average)
        yield                       # the network is changed here
        before = grow(average, change)
        try:
            yield                   # the growth is proved here
        except Exception:
            restore(average, before)
            raise

What else auxin is to know of that kind (``verify=``, ``save=``, ``load=``, ``wraps=``) stands in the same call.
"""

from __future__ import annotations

import importlib

from auxin.companion import Follower, follow

__all__ = ["Follower", "follow"]

for _name in (
    "average",
    "ddp",
    "fsdp",
    "listed",
    "optimizer",
    "scaler",
    "scheduler",
    "second_tree",
):  # these register themselves
    importlib.import_module(f"auxin.follow.{_name}")
