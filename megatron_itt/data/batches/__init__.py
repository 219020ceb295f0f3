"""Indexed datasets to training batches: blend, sample indices, sampler, loaders.

Nothing is imported here: a blend can be planned without torch.
"""
