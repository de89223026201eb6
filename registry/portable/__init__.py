"""A whole registry, or a namespace of it, in one file that any other registry takes."""
