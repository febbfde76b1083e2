"""What the paper claims, tried."""
