"""What a run tells its user: the summary, the closing table, pictures, histories, evaluation tables."""

import logging

# What it says at its import, of a home that is not there or cannot be written, helps nobody
logging.getLogger("matplotlib").setLevel(logging.ERROR)
