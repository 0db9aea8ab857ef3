"""`python -m pte_vllm` is the `pte-vllm` command."""

from pte_vllm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
