"""Tests of the driver. Its estimates measure this machine for ten milliseconds, not for a second:
how precise they are, no test asks.
"""

from reap_driver.memory import rates

rates._SECONDS = 0.01
