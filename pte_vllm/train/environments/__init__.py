"""Environments of the `verifiers` library: a process that plays episodes, and how to ask it.

It may import `data`, `options` and `wire`. Nothing here imports `verifiers`: the worker does, which
may run in a Python environment of its own.
"""
