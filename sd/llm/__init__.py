"""A language model from scratch: weights, tokens, adapters, sampling.

It knows nothing of the method.
"""
