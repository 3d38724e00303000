"""The routes under /reap of vLLM's API server."""
