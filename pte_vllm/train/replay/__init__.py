"""The forward and backward pass of a model under a plan, in plain transformers.

Imports `method`, `models` and `adapter`, nothing else of `train`. run, grpo, distill and the
experiments import it, and so do tests, as the measure of what the engine computes.
"""
