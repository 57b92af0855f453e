"""Deeper and wider copies of a saved Hugging Face checkpoint, on disk: ``auxin upscale``.

Imported on demand; ``import auxin`` does not load it.
"""

from auxin.upscale.plan import Plan
from auxin.upscale.run import freeze_old, new_blocks, plan_upscale, upscale, write_upscale
from auxin.upscale.wide import plan_wider, widen

__all__ = ["Plan", "freeze_old", "new_blocks", "plan_upscale", "plan_wider", "upscale", "widen", "write_upscale"]
