"""softprompt: one frozen language model, many soft prompts, chosen per request."""

__version__ = "0.1.0"
