"""Checks of a growth on a user's own network, for a user's own tests."""
