"""The command line: `main` dispatches, and each command group has a file of its own.

Every module reads flags with the standard library only, and imports what runs a command when it
runs: help and mistakes are answered at once. Nothing but `__main__` and tests imports this folder.
"""
