"""Everything that touches transformers' semi-private API, so that a new release is checked here."""
