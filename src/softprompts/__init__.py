"""softprompts: learned prompts for frozen language models."""
