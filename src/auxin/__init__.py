"""Grow PyTorch networks while they train, in place, with everything that hangs on them kept in step."""

__version__ = "0.1.0"
