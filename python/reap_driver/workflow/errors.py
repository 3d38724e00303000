"""The error of options, apart from what declares them, which must not import torch."""

from reap_kernels.errors import UsageError


class OptionError(UsageError):
    """Options are missing, unknown, or contradict each other; exit code 2 on the command line.

    Example:
        >>> rd.DataOptions(data="code.jsonl", max_len=512)
        Traceback (most recent call last):
        reap_driver.workflow.errors.OptionError: `max_len=512`: only with `packing='none'`; ...
    """

    exit_code = 2
