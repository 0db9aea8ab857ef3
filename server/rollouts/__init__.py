"""Sampling and scoring for trainers: bodies, jobs on the engine, and the stream of records.

Only the endpoint plugin imports it. It may import `wire`, `method`, vLLM, and the server's
`service`, `adapters`, `access` and `metrics`.
"""
