"""Accuracy and fidelity under a cache budget."""
