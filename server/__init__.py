"""Routes on vLLM's own FastAPI app. Installed as `pte_vllm.server`."""
