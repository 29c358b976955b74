"""Other people's loops and engines, with our prompts in them."""
