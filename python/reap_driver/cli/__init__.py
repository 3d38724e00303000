"""The command line: a thin face of `reap_driver.workflow`."""
