"""`pte-vllm doctor`: what is installed, whether it fits together, how to mend what does not."""
