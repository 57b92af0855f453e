"""Which axes of which tensors share one width, read off one forward."""
