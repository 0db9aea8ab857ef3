"""Rewards: how right an answer is, decided in a process that can be killed where code must run.

Imports `train.data`; grpo imports it. The trainer never runs what a model wrote.
"""
