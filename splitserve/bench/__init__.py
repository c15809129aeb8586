"""Replays a workload against a running suite or an engine in this process, and measures."""
