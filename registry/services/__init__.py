"""What the registry does, feature by feature; no HTTP here."""
