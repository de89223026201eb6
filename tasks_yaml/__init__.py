"""Task definitions for lm-evaluation-harness: the ``t2_*`` YAML files of this folder, and the functions they name."""
