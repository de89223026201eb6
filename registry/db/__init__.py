"""The registry's tables and the way to its database."""
