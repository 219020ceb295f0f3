"""The Hugging Face model of an Inner Thinking Transformer.

These files are copied into every export and run there alone: they import torch, transformers and each other, nothing
of this package. How to use one: `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`.
"""
