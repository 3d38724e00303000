"""The terminal's view of a server: what is seen at one time, its picture, and the screen."""
