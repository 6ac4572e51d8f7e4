"""The papers' claims as commands: one file a claim, ``python -m claims.NAME``; recorded figures in ``results``."""
