"""`pte-vllm doctor`: what is installed here, whether it fits together, and how to mend what does not."""
