"""The demo's data set, not in the wheel."""
