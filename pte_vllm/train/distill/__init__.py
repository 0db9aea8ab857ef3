"""Distillation: the window with an adapter learns to answer as full attention does.

Imports options, data, replay and run of `train`, and `wire`; the command line imports
`distill.loop`, and the experiments its examples and its step. Does not know GRPO.
"""
