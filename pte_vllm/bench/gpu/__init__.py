"""`pte-vllm bench gpu`: what a GPU gains, in one command for a machine without a network.

`run` decides which parts are left, `part` does one of them in a process of its own, and `tables`
shows the results. Like the rest of `bench`, only the command line imports it.
"""
