"""What a run tells its user: the summary, the closing table, pictures, histories, evaluation tables."""

import logging

# It warns of a home that is not there or cannot be written, about which nothing needs to be done
logging.getLogger("matplotlib").setLevel(logging.ERROR)
