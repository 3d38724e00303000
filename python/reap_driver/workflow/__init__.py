"""The whole jobs that the command line and Python call: options in, typed results out."""
