"""Files of other tools, read and written; `formats` is their table, and each has a module."""
