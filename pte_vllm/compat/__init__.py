"""What we rely on in vLLM, symbol by symbol, and whether the installed vLLM still has it.

`hooks.toml` is the ledger; `upstream` reads vLLM's files and imports none of them. Patches, doctor
and tests import this folder. It imports the standard library only.
"""
