"""Versions of adapters that were pushed: read from a request, checked, stored, served and retired.

Routes, rollouts and `service` may import it. It may import `adapter`, `method`, `engine`, vLLM and
the server's `metrics`, but no route and no service.
"""
