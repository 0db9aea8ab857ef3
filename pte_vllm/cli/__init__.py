"""The `pte-vllm` command: parsers, one file for each group of commands.

Nothing but `__main__` imports this folder. Its files import what a command runs only once that
command is known, so that help and mistakes are answered at once.
"""
