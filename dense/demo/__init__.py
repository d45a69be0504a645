"""What the demo trains on, not part of the wheel."""
