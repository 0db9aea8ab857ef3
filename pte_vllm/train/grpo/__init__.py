"""Cache-aware GRPO: reinforcement learning from rollouts that a server samples under a window.

Imports options, data, rewards, replay and run of `train`, and `wire`; the command line imports
`grpo.loop`. Does not know distillation.
"""
