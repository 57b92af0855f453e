"""Checkpoints as data: an atomic directory of typed JSON and safetensors, no pickle."""
