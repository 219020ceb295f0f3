"""Where both formats meet: the Hugging Face model, the tensor table, export and import."""
