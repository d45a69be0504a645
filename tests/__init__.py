"""A regular package: a namespace would lose to the package ``tests`` that other wheels install."""
