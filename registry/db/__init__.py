"""The registry's tables and the way to its database."""

import logging

# Its account of every connection would stand among the lines of each program that opens a registry.
logging.getLogger("alembic").setLevel(logging.WARNING)
