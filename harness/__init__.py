"""lm-evaluation-harness: the model ``t2``, tasks as adaptation material, and reports. Cheap to import."""
