"""lm-evaluation-harness: the model ``t2``, its tasks as adaptation material, and what it reports. Importing this is cheap."""
