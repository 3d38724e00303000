"""Compiles every launch of the launch tables without a GPU, and gates the machine code.

`launches` records what the host code would launch, `code` compiles it and reads the machine code,
`sass` finds the main loop of a product in it, `limits` says what is wrong: spills, local memory, no
tensor-core instructions for 16-bit operands, more waits, barriers, copies or registers than stated
limits or the newest recorded run allow.
"""


def main(arguments: list[str]) -> None:
    """See `bench.aot.command`."""
    from bench.aot import command

    command.main(arguments)
