"""The networks and the bit-for-bit comparisons come from the scenarios and the attacks."""

import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path += [str(TESTS / "scenarios"), str(TESTS / "attack")]
