"""Find profiles: a width for every layer, under a budget, by evolutionary search with the original model as the judge."""
