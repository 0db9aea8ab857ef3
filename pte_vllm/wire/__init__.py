"""Both ends of HTTP: the record of a rollout, and the client that asks a server for some.

Server, trainer, bench and examples may import it. It may import `method` and the hashes of
`adapter`; never torch, vLLM, the server or the trainer.
"""
