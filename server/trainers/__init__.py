"""Routes of vLLM's and other trainers' making, so that those work against this server unchanged.

Only the endpoint plugin imports it. It may import vLLM, and the server's `service`, `adapters` and
`access`.
"""
