"""The networks and the bit-for-bit comparison of these tests live beside the scenarios."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "scenarios"))
