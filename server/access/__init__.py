"""Who may call a route, how large its body may be, and how much work may wait.

Routes of any folder may import it. It may import FastAPI and vLLM, and nothing else of the server.
"""
