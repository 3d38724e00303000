"""GPTQModel starts no more threads than these; on fewer cores it ends at its import."""

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
