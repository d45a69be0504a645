"""How fast operators, networks and whole models are, beside the peers a user would take instead."""
