"""What the tests of all engines share: small models, whole and pruned, and the table of results."""
