"""The teacher pass, its code, an epoch's labels, and what looks into a store."""
