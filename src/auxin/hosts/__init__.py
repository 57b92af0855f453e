"""Growth inside other people's training loops; each host is imported on demand, as ``auxin.hosts.transformers``."""
