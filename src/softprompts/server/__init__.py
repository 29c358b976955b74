"""``softprompts serve``: an OpenAI-compatible server of one frozen model and its prompts, and a page to try them."""
