"""The registry from Python: embedded or over HTTP."""
