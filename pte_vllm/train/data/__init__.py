"""Questions to train on: data sets, files, generators, and a stream with a position to save.

Imports `train.options` only, and neither torch nor transformers; rewards, grpo, distill and the
experiments import it.
"""
