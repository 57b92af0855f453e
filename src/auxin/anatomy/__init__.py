"""Reading a network: its tree, what arrives at a place, which tensors write a block's output. Nothing here writes."""
