"""Everything that touches transformers' semi-private API, in one place, so that a new release is checked here."""
