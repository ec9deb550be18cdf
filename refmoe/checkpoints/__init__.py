"""Layouts on disk to the spec's parameters: Hugging Face's, Mistral's own, and the synthetic formula."""
