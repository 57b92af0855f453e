"""Checkpoints as data: an atomic directory of typed JSON and safetensors, no pickle."""

from auxin.checkpoint.run import load, save

__all__ = ["load", "save"]
