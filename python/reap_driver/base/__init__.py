"""What every package may use: checks of arguments, signals, threads, units, YAML."""
