"""The operations of the API, feature by feature."""
