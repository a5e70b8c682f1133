"""`trainer compare`: several methods or policies, an equal budget for each, one table."""
