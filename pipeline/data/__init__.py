"""Sources become shards, shards an index; an index has an order, and its images decode."""
