"""What auxin knows of models that are built from a configuration, as those of Hugging Face are."""
