"""All uses of transformers' semi-private API: what to check against a new release."""
