"""The command line: one file per group of verbs, tied together by :mod:`softprompts.cli.main`."""
