"""The loader against its peers."""
