"""The commands of `reap-kernels`, a module each.

A command module has NAME, SUMMARY, DESCRIPTION, EXAMPLES, `configure(parser)` for its arguments,
and `run(args, console)`, which does the work, tells a human through the console, and returns what
`--json` prints. No module imports torch before `run`.
"""

from types import ModuleType

from reap_driver.cli import (
    apply,
    check,
    compare,
    convert,
    demo,
    doctor,
    live,
    observe,
    plan,
    prune,
    recipe,
    refit,
    report,
    search,
    tune,
)

COMMANDS: tuple[ModuleType, ...] = (
    demo,
    prune,
    observe,
    plan,
    search,
    apply,
    refit,
    compare,
    report,
    check,
    convert,
    recipe,
    live,
    doctor,
    tune,
)
