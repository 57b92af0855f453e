"""Depth up-scaling of a saved Hugging Face checkpoint, on disk: ``auxin upscale``.

Imported on demand; ``import auxin`` does not load it.
"""

from auxin.upscale.plan import Plan
from auxin.upscale.run import freeze_old, new_blocks, plan_upscale, upscale, write_upscale

__all__ = ["Plan", "freeze_old", "new_blocks", "plan_upscale", "upscale", "write_upscale"]
