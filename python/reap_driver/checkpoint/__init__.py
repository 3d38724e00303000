"""The checkpoint writer: files in, files out, in constant memory (`apply_plan`).

safetensors_file, source   reading and checking what is there
derive, models             which tensors hold experts: the model built with E and with E' experts
loaded                     the same of a model in memory
keys, lists, mtp, actions  what happens to each tensor
checks, config_edit        the plan against the model; edits of config.json
masks                      a plan as masks of the original's routers, instead of a checkpoint
shards, stream, parallel   writing: what goes into which file, its bytes, files at once
staging                    the folder that gets its name last
verify, card, report       what came out
"""

from reap_driver.checkpoint.apply import apply_plan, check_plan
from reap_driver.checkpoint.report import ApplyReport

__all__ = ["ApplyReport", "apply_plan", "check_plan"]
