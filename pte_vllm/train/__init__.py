"""The trainer: a separate process that never imports vLLM."""
