"""What a model is: its sizes and tensors, the published ones by name, and its Hugging Face files."""
