"""What to grow and where: one file per edit."""
