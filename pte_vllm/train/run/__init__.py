"""What every run starts with, keeps and shows: model, checkpoints, metrics, signals, its server.

Imports `train.options`, `train.replay`, `adapter` and `wire.client`; grpo and distill import it.
"""
