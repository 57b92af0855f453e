"""Second moments of what ordinary layers read, hold and are asked to change, taken by hooks while a network runs.

The symbols are those of ``auxin.score``: X is what the producer reads, H what the consumer reads, G the gradient of the
loss at the consumer's output, D = -N G what the loss of each sample asks of that output.
"""

from auxin.statistics.measured import measured
from auxin.statistics.moments import PairMoments, SiteMoments
from auxin.statistics.places import Pair, Proposal, Site
from auxin.statistics.watch import Watch, watch

__all__ = ["Pair", "PairMoments", "Proposal", "Site", "SiteMoments", "Watch", "measured", "watch"]
