"""Our routes on vLLM's own FastAPI app, installed as `pte_vllm.server`.

vLLM loads `endpoint_plugin`, which nothing else imports. Tools that start or inspect a server may
import the rest. The package may import vLLM, `engine`, `adapter`, `method` and `wire`, and never
the trainer.
"""
