"""What a cut loses, and what least squares give back: from Grams to smaller down projections."""
