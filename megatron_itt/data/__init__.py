"""Text to training batches: corpus, tokenizer, indexed datasets, blend, samples, loaders.

Nothing is imported here: preprocessing and planning work without torch, and their worker processes start fast.
"""
