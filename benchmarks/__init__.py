"""Side-by-side measurements against peers; each prints JSON lines. Not installed."""
