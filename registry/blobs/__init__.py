"""Where the bytes of experts lie."""
