"""Facts about base models: how their keys are rotated, and where a small one comes from.

Imports `method`; adapter, train and the command line import it. Knows nothing of adapters.
"""
