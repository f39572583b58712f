"""Entry points: `mbrl <job>` after an install, `python scripts/<job>.py` from a checkout."""
