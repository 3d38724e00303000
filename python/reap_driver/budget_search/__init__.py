"""Budget search: an evolutionary search for how many experts each layer loses."""
