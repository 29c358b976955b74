"""``python -m softprompts`` is ``softprompts``."""

from softprompts.cli.main import main

if __name__ == "__main__":
    main()
