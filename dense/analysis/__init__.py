"""Developer tools, not in the wheel: complexity, the paper's tables, comparison, benchmark."""
