"""Without the packages there is nothing to collect: `make companions` installs them, and says where they are."""

import importlib.util
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ("ecosystem", "scenarios", "zoo")]
collect_ignore = [] if importlib.util.find_spec("schedulefree") else ["test_ecosystem.py"]
