"""How good soft prompts are, beside the ways that change the model: docs/quality.md."""
