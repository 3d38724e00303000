"""How long tests wait for another thread or process before they call it hung."""

# Seconds. The limit only ends a test that would never end; no result depends on it. It is therefore
# far above what the slowest and busiest machine needs.
HUNG = 240.0
