"""Time and memory of operators, networks and whole models, beside their alternatives."""
