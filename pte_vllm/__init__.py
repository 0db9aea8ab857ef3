"""Progressive Thought Encoding (arXiv 2602.16839) on vLLM 0.32.

Importing this package imports neither torch nor vllm. `docs/architecture.md` says which module
does what.
"""

__version__ = "0.32.0.post1"
