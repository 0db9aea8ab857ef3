"""Experiments of the paper, each a command of its own, on generated tasks or a small real model.

Imports data, distill and replay of `train`; the command line imports it, and the benchmarks import
the curve of training memory. Nothing else depends on it.
"""
