"""The options of a training run, as a TOML file and flags give them.

Everything in `train` may import this folder; it imports `adapter.defaults` and `method` only, and
neither torch nor transformers, so that `--help` answers at once.
"""
