"""From documents and videos to shards: what `data_tools/` calls."""
