"""Searched budgets: how many experts each layer loses, found by evolution on the model itself."""
