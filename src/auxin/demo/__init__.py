"""``auxin demo``: one network grows on the M3 forecasting competition, or on the user's own series."""
