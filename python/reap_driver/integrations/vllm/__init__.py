"""Live statistics and masks of experts inside vLLM, as plugins of the stock server.

`engine` runs in vLLM's workers and imports torch, reap_kernels and vLLM alone; `server` is the HTTP
surface, in the API server; `client` talks to it from anywhere. `client` and `plugin` need no vLLM.
"""
