"""What can happen to multi-token-prediction layers when a checkpoint is pruned."""

from typing import Literal

# "drop" leaves them out; "prune" cuts their experts; "keep" leaves them all experts.
MtpChoice = Literal["drop", "prune", "keep"]
