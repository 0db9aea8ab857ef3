"""State-modulated LoRA: what stands between A and B in each of vLLM's LoRA layers.

`manager` loads adapters, `slots` says which state modulates which token, `cpu` and `cuda` have the
views of vLLM's punica wrapper, and `install` puts those into a model. Only the engine's runners
import this folder, and the benchmarks to time it. Of the engine it imports two modules, `state` and
`huge_pages`.
"""
