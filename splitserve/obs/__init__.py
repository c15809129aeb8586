"""Tracing, metrics and logging: every name that leaves a process is in `names`."""
