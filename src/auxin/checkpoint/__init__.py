"""Checkpoints as data: an atomic directory of typed JSON and safetensors, no pickle."""

from auxin.checkpoint.run import async_save, load, save

__all__ = ["async_save", "load", "save"]
