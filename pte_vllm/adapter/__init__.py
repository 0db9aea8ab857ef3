"""The adapter: a PEFT LoRA and the encoder that writes thought states, on disk and newly made.

Imports `method` and `models`; engine, server, train and the tools import it. `defaults` and
`hashes` are standard library only, the rest needs torch.
"""
