"""Changes to vLLM that no plugin point reaches; `README.md` is the ledger. Installed as `pte_vllm.patches`."""
