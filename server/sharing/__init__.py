"""What the API servers of one `pte-vllm serve` share, in files of one directory.

With one API server there is no directory, and each thing here stays in memory.
"""
