"""The routes that OpenAI's clients speak, and vLLM's two beside them."""
