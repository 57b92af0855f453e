"""The networks and the bit-for-bit comparison come from the scenarios."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "scenarios"))
